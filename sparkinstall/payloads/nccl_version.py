"""Print the version that the NCCL library in argv[1] reports: 22809 is 2.28.9."""

import ctypes
import sys

version = ctypes.c_int()
ctypes.CDLL(sys.argv[1]).ncclGetVersion(ctypes.byref(version))
print(version.value)
