"""Write the API pages from the docstrings."""

import argparse
import logging
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc.render
from pdoc.doc import Module

from dist_swa import __version__

PAGES = (
    "dist_swa",
    "dist_swa.checkpoint",
    "dist_swa.integrations",
    *(f"dist_swa.integrations.{name}" for name in ("accelerate", "transformers", "lightning", "composer")),
)


def add_stand_in_for_composer() -> None:
    """Composer is not in .venv, because it needs an older torch. Its adapter imports these names."""
    core = ModuleType("composer.core")
    for name in ("Algorithm", "Event", "State", "get_precision_context"):
        setattr(core, name, type(name, (), {"__module__": "composer.core"}))
    sys.modules |= {"composer": ModuleType("composer"), "composer.core": core}


def submodules(module: Module) -> list[Module]:
    """Return the pages below one. pdoc would take the function ``checkpoint.merge`` for the file of that name."""
    return [Module.from_name(page) for page in PAGES if page.rpartition(".")[0] == module.fullname]


def write_pages(folder: Path) -> None:
    logging.disable(logging.WARNING)  # frameworks log about packages that they do not find
    warnings.filterwarnings("error", module="pdoc")
    add_stand_in_for_composer()
    Module.submodules = property(submodules)
    pdoc.render.configure(docformat="google", footer_text=f"dist_swa {__version__}")
    # "!" leaves out the modules below a page: they are private.
    pdoc.pdoc(*(spec for page in PAGES for spec in (page, rf"!{page}\..*")), output_directory=folder)
    for page in folder.rglob("*.html"):
        page.write_text(without_dead_links(page.read_text()))


def without_dead_links(html: str) -> str:
    """Remove links within a page to members that it does not show: those that a class inherits from a framework."""
    shown = set(re.findall(r'id="([^"]+)"', html))
    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', lambda link: link[0] if link[1] in shown else link[2], html)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("launch/docs", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default="build/api", help="of the pages (default: %(default)s)")
    folder = parser.parse_args().folder
    write_pages(folder)
    print(f"launch/docs: open {(folder / 'index.html').resolve()}")
