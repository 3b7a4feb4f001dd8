"""The last lines of a run: each failed test with the first line of its error, however long the reports above are."""

import pytest

LINES, WIDTH = 15, 240


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print them after pytest's own output. Worker processes have no terminal."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if not isinstance(terminal, pytest.TerminalReporter) or hasattr(config, "workerinput"):
        return
    failed = [*terminal.stats.get("failed", ()), *terminal.stats.get("error", ())]
    if not failed:
        return
    terminal.section("failed tests", red=True)
    for report in failed[:LINES]:
        terminal.write_line(f"{report.nodeid}: {_why(report)}"[:WIDTH], red=True)
    if len(failed) > LINES:
        terminal.write_line(f"and {len(failed) - LINES} more, named above", red=True)


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines()
    # The report of a file that cannot be imported has the error at the end.
    return (lines[0] if crash else lines[-1].removeprefix("E ").strip()) if lines else "no reason given"
