"""Whose code a failure is of, and the search for reports of it."""

from urllib.parse import parse_qs, urlsplit

import pytest

from sparkinstall.diagnose import projects
from sparkinstall.diagnose.index import index_of
from sparkinstall.diagnose.judge import Diagnosis, judge, read
from sparkinstall.diagnose.signatures import load
from sparkinstall.diagnose.sources import Log

VENV = "/srv/venv/lib/python3.12/site-packages"


def traceback(*files: str, ends: str = "ValueError: the widget is not as it was expected to be") -> str:
    frames = "".join(f'  File "{each}", line 7, in own_widget_loader\n    call()\n' for each in files)
    return f"Traceback (most recent call last):\n{frames}{ends}\n"


def diagnosed(text: str) -> Diagnosis:
    return judge([read(Log("own.log", lambda: iter([text.encode()])), index_of(load()))])


def searched(link: str) -> str:
    return parse_qs(urlsplit(link).query)["q"][0]


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ((f"{VENV}/vllm/own.py",), "vLLM"),
        (("/usr/share/netplan/netplan/cli/own.py",), "netplan"),
        # What others call raises what is theirs.
        ((f"{VENV}/vllm/own.py", f"{VENV}/torch/own.py", f"{VENV}/pydantic/own.py"), "vLLM"),
        ((f"{VENV}/torch/own.py",), "PyTorch"),
        # A package that is not known was called, a script of the user was not.
        ((f"{VENV}/vllm/own.py", f"{VENV}/own_package/own.py"), "vLLM"),
        ((f"{VENV}/vllm/own.py", "/home/own/script.py"), None),
        # Python itself, and an environment in a folder called vllm.
        ((f"{VENV}/ray/own.py", "/usr/lib/python3.12/json/decoder.py"), "Ray"),
        (("/srv/vllm/lib/python3.12/site-packages/own_package/own.py",), None),
        ((), None),
    ],
)
def test_whose_code_a_traceback_is_of(files: tuple[str, ...], name: str | None) -> None:
    found = projects.raised_by(traceback(*files))
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("files", "is_elsewhere"),
    [
        ((f"{VENV}/torch/own.py", "/home/own/script.py"), True),
        (("/home/own/script.py", f"{VENV}/transformers/own.py"), True),
        ((f"{VENV}/transformers/own.py", f"{VENV}/torch/own.py"), False),
        ((f"{VENV}/vllm/own.py", f"{VENV}/numpy/own.py"), False),
        (("/home/own/script.py", f"{VENV}/vllm/own.py"), False),
        ((), False),
    ],
)
def test_a_traceback_without_a_server_is_elsewhere(files: tuple[str, ...], is_elsewhere: bool) -> None:
    assert projects.is_elsewhere(traceback(*files)) == is_elsewhere


@pytest.mark.parametrize(
    ("log", "is_of_one"),
    [
        ("own-agent: Error: own lists are Not Supported", False),
        ("own-agent: Error: own lists are Not Supported by the model", True),
        ("loading sgl_kernel for SGLang", True),
        ("a job of own-llama_cpp", True),
        ("kernel: own: auth tokens are expired", False),
    ],
)
def test_a_log_that_names_no_server_and_no_model_is_of_none(log: str, is_of_one: bool) -> None:
    assert projects.is_of_a_server(log) == is_of_one


@pytest.mark.parametrize(
    ("message", "where", "words"),
    [
        ("RuntimeError: n_group must not be zero for routing 7 groups", "", '"n_group must not be zero for routing"'),
        ("AttributeError: 'Own' object has no attribute 'rope'", "own.py, own_widget_loader",
         '"object has no attribute" Own rope own_widget_loader'),
        ("KeyError: 'own_rope'", "own.py, run", '"KeyError own_rope"'),
        ("AssertionError", "own.py, own_widget_loader, called by x.py, run", "AssertionError own_widget_loader"),
        # What stands apart in the log is no one text.
        ("NCCL WARN transport/own.cc: Own failure 7", "", '"NCCL WARN Own failure" own.cc'),
        ("ValueError: the own 7: 'rope'", "", '"ValueError the own" rope'),
        ("KeyError: 7 rope", "own.py, own_widget_loader", "rope KeyError own_widget_loader"),
        # Too little, or only what differs.
        ("AssertionError", "vllm/own.py, forward", ""),
        ("KeyError: 7", "", ""),
    ],
)  # fmt: skip
def test_words_to_search_for(message: str, where: str, words: str) -> None:
    vllm = next(each for each in projects.projects() if each.name == "vLLM")
    link = projects.reports(vllm, message, where)
    assert (searched(link) if link else "") == words


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        # The log's last word may be half a one.
        ("the own widget was not fou", '"the own widget was not"'),
        ("the own widget was not found.", '"the own widget was not found"'),
        ("the own widget was not found\nown: goodbye", '"the own widget was not found"'),
        ("own widget lost", '"own widget lost" own_widget_loader'),
    ],
)
def test_word_that_the_end_of_the_log_may_have_cut_is_not_searched_for(ends: str, words: str) -> None:
    (cause,) = diagnosed(traceback(f"{VENV}/vllm/own.py", ends=f"ValueError: {ends}")).causes
    assert searched(cause.links[-1]).removesuffix(" own_widget_loader") == words.removesuffix(" own_widget_loader")


def test_reports_are_the_last_link_of_a_general_kind() -> None:
    ends = "ValueError: the widget is not as it was expected to be."
    (cause,) = diagnosed(traceback(f"{VENV}/vllm/own.py", ends=ends)).causes
    assert searched(cause.links[-1]) == '"the widget is not as it was expected to be"'
    assert cause.hint.endswith("look for these words in the reports of vLLM (the last link)")


def test_line_that_nothing_is_known_of_names_a_search_in_all_reports() -> None:
    (telling,) = diagnosed("own-loader: fatal error: own tables don't fit the own 17 slots\n").telling
    link = telling.advice[-1].rpartition(" ")[2]
    assert link.startswith("https://github.com/search?type=issues&q=")
    assert searched(link) == '"own-loader: fatal error: own tables don\'t fit the own"'


@pytest.mark.parametrize(("end", "is_advice"), [(" Add suitabl", False), (" Add suitable nodes to this cluster", True)])
def test_advice_of_which_the_log_has_only_the_beginning_is_none(end: str, is_advice: bool) -> None:
    found = diagnosed(f"own-autoscaler: Error: no own node fulfills the request.{end}\n")
    assert any(end.strip() in each.hint for each in found.causes) == is_advice


def test_what_is_said_of_a_model_is_not_said_of_another_program() -> None:
    ends = "AttributeError: 'str' object has no attribute 'get'"
    (cause,) = diagnosed(traceback("/usr/share/netplan/netplan/cli/own.py", ends=ends)).causes
    (of_server,) = diagnosed(traceback(f"{VENV}/vllm/own.py", ends=ends)).causes
    assert cause.name == of_server.name == "plain-value-in-place-of-an-object"
    assert "model" not in cause.why + cause.hint and "model" in of_server.why
    assert cause.links[-1].startswith("https://bugs.launchpad.net/netplan/") and "%22" not in cause.links[-1]


def test_a_secret_is_not_searched_for() -> None:
    found = diagnosed(
        traceback(f"{VENV}/vllm/own.py", ends=f"ValueError: a widget has the name hf_{'a' * 34} which is wrong")
    )
    assert all("aaaa" not in link for cause in found.causes for link in cause.links)
