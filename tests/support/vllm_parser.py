"""The parser of a vLLM, made from the source in its wheel, without torch and without the rest of vLLM."""

import argparse
import logging
import re
import sys
from types import ModuleType
from typing import Any, NoReturn

from tests.support.wheel_member import needed_member


def empty_parser(release: str) -> Any:
    """vLLM's own argument parser, without options. It raises ValueError or argparse.ArgumentError for what is wrong."""
    source = needed_member(release, "vllm/utils/argparse_utils.py").decode()
    stubs = {"regex": re, "vllm": ModuleType("vllm"), "vllm.logger": ModuleType("vllm.logger")}
    logger: Any = logging.getLogger("vllm")
    logger.disabled, logger.warning_once = True, logger.warning
    stubs["vllm.logger"].__dict__["init_logger"] = lambda _: logger
    module = ModuleType("argparse_utils")
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        exec(compile(source, "argparse_utils.py", "exec"), module.__dict__)
    finally:
        for name, former in before.items():
            sys.modules.pop(name)
            sys.modules.update({name: former} if former else {})
    parser = module.FlexibleArgumentParser(exit_on_error=False)
    parser.error = _refuse
    return parser


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


BOOLEAN = argparse.BooleanOptionalAction
"""The action of a switch; newer releases replace it with one of their own."""
