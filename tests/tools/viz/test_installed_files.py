"""The page's files are installed with the package, and what is not ours comes with its licence."""

import subprocess
import sys
from importlib import resources

from fxopt.tools.viz.web_page import SCRIPTS
from tests.test_layout import ROOT

VIZ = resources.files("fxopt.tools.viz")


def test_a_build_holds_every_file_of_the_page(tmp_path):
    code = "from setuptools import setup; setup()"
    steps = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", *steps], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "fxopt" / "tools" / "viz"
    for folder in ("page", "vendor"):
        source = ROOT / "tools" / "viz" / folder
        wanted = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        assert wanted
        assert (
            sorted(path.relative_to(built / folder) for path in (built / folder).rglob("*") if path.is_file()) == wanted
        )


def test_every_script_is_in_the_page_once():
    written = {path.name for path in VIZ.joinpath("page").iterdir() if path.name.endswith(".js")}
    assert sorted(written) == sorted(SCRIPTS)


def test_the_layout_library_comes_with_its_licence():
    vendor = VIZ.joinpath("vendor", "dagre")
    licence = vendor.joinpath("LICENSE").read_text()
    assert "Permission is hereby granted, free of charge" in licence
    assert "@dagrejs/dagre` 3.1.3 (MIT" in vendor.joinpath("README.md").read_text()
    assert "sourceMappingURL" not in vendor.joinpath("dagre.min.js").read_text()
