"""vLLM's own dashboards for Grafana: under its licence, from a release of its repository, by their sha256."""

import hashlib

from msgspec import Struct

from sparkinstall.downloads import page
from sparkinstall.errors import CommandFailed

RELEASE, LICENCE = "v0.33.0", "Apache-2.0"
REPOSITORY = "https://github.com/vllm-project/vllm"
_FILES = "https://raw.githubusercontent.com/vllm-project/vllm"
_LARGEST = 1 << 20


class VllmDashboard(Struct, frozen=True):
    """A file of vLLM's repository. `has`: what it shows; `at`: the address of its release."""

    path: str
    sha256: str
    has: str
    at: str = f"{_FILES}/{RELEASE}"

    @property
    def url(self) -> str:
        return f"{self.at}/{self.path}"


VLLM_DASHBOARDS = {
    "overview": VllmDashboard(
        "examples/observability/prometheus_grafana/grafana.json",
        "f9de0e5032ca918f3c21f3b0bb90bfdcef5ca4657f0a7977cd9f73679f9ced16",
        "latencies, throughput, scheduler, KV cache, lengths of requests, of one model",
    ),
    "performance": VllmDashboard(
        "examples/observability/dashboards/grafana/performance_statistics.json",
        "507f481a47ed3606826aa373704dd84b28dfc311456398fed73dc992d649c637",
        "TTFT, ITL and E2E as percentiles and averages, tokens a second",
    ),
    "queries": VllmDashboard(
        "examples/observability/dashboards/grafana/query_statistics.json",
        "459de6707d482b462fc3922b5964a743bd5b2cc1f45365661eb04d7b7fd1faaa",
        "requests and tokens over time, distribution of lengths",
    ),
}


def fetched(of: VllmDashboard) -> str:
    """Download a dashboard.

    Raises:
        NotDownloaded: its server cannot be reached or refuses.
        CommandFailed: it is another file.
    """
    content = page(of.url, _LARGEST)
    if hashlib.sha256(content).hexdigest() != of.sha256:
        raise CommandFailed(
            f"{of.url} is not the file that this sparkinstall knows",
            cause="its sha256 differs",
            hint=f"look at {REPOSITORY} yourself, and import the file from there",
        )
    return content.decode()
