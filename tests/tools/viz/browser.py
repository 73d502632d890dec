"""A page in headless Chromium, with what it logs and asks for."""

import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
DRIVER = shutil.which("chromedriver")


def why_not() -> str | None:
    """Return why there is no browser to test in, or None."""
    if CHROMIUM is None:
        return f"none of {', '.join(PROGRAMS)} is installed"
    if DRIVER is None:
        return "chromedriver is not installed"
    try:
        import selenium  # noqa: F401  # asked for, not used
    except ImportError:
        return "selenium is not installed"
    return None


needs_browser = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Browser:
    """One Chromium, which opens pages one after the other."""

    def __init__(self, width: int = 1400, height: int = 900) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        for argument in (
            "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}",
            "--disable-background-networking", "--no-first-run", f"--user-data-dir={self._profile.name}",
        ):  # fmt: skip
            options.add_argument(argument)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium refuses to run as root otherwise
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, path: pathlib.Path, *, dark: bool = False) -> None:
        """Open a file, in the dark scheme if asked for; what was logged before is forgotten."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.errors()
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page, and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> Any:
        """Run JavaScript that ends by calling ``done``."""
        return self.driver.execute_async_script(f"const done = arguments[arguments.length - 1]; {script}")

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def errors(self) -> list[str]:
        """Return what the page logged since it was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since this was asked last."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        """End the browser."""
        self.driver.quit()
        self._profile.cleanup()
