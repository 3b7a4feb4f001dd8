"""See serve.py."""

from dataclasses import dataclass


@dataclass
class SampleRequest:
    prompt: list[int]
    prompt_len: int
    expected_output_len: int
