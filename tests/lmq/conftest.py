"""A browser for the tests of pages; starting one takes a second, so all of them share it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lmq.report.browser import Page, browser


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A tab of headless Chromium; skips where there is none."""
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page
