"""Lines that a terminal has cut, that have several beginnings, or that are very long."""

from sparkinstall.diagnose.lines import take_apart
from tests.support.diagnosing import diagnosed


def test_message_that_a_terminal_has_cut_has_the_numbers_of_all_its_lines() -> None:
    log = """(EngineCore pid=3) ValueError: To serve at least one request with the model's max seq len
(90000), 3.09 GiB KV cache is needed, which is larger than the available KV
cache memory (0.24 GiB). Estimated maximum model length is 57344.
"""
    (cause,) = diagnosed(log.encode()).causes
    assert (cause.name, "(57344)" in cause.hint, cause.count) == ("kv-cache-too-small", True, 1)


def test_word_that_was_cut_at_the_width_of_a_terminal_is_one_again() -> None:
    who = "(Worker_TP0 pid=28) ERROR 05-30 19:59:18 [multiproc_executor.py:870] "
    frame = '  File "/srv/env/lib/python3.12/own-packages/vllm/own.py", line 5, in own'
    whole = (who + frame, f"{who}AssertionError: 14 is not divisible by 4")
    text = "\n".join(f"{each[:96]}\n{each[96:]:96}" for each in whole)
    (cause,) = diagnosed(f"{text}\n".encode()).causes
    assert cause.name == "size-not-divisible" and cause.lines[0].text == whole[1]


def test_line_with_several_beginnings_is_one_line() -> None:
    who = "        (EngineCore_DP0 pid=1026745) (Worker_TP0 pid=1026751) ERROR 02-01 09:32:13 [executor.py:852] "
    found = diagnosed(f"{who}ValueError: {'own tables do not fit, ' * 6}\n".encode())
    assert found.logs[0].lines == 1 and [each.line for each in found.causes[0].lines] == [1]


def test_long_line_is_shown_around_the_match() -> None:
    (place,) = diagnosed(b"x" * 1500 + b" No space left on device " + b"y" * 9000).causes[0].lines
    assert "No space left on device" in place.text
    assert len(place.text) < 420


def test_line_of_a_logger_that_does_not_know_the_date_has_no_time() -> None:
    line = take_apart("E0000 00:00:00.123456    1234 own.cc:83] Unable to register the own factory")
    assert (line.level, line.when) == ("error", None)
    assert take_apart("E0000 00:00:1733333333.123456    1234 own.cc:83] Unable to register it").when is None


def test_line_that_was_pasted_in_bold_is_read() -> None:
    log = "**INFO 12-08 22:01:10 own.py:1] up**\n**ERROR 12-08 22:01:13 own.py:5] ValueError: own 5 of 4**\n"
    found = diagnosed(log.encode())
    assert [each.text for each in found.telling] == ["ERROR 12-08 22:01:13 own.py:5] ValueError: own 5 of 4"]
