"""What pyproject.toml cannot say: the long description is README with absolute links."""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from scripts.links import absolute_links  # noqa: E402

setup(
    long_description=absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), ROOT),
    long_description_content_type="text/markdown",
)
