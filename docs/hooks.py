"""Hooks of MkDocs and of griffe for the site: pages from outside docs/, links, and the examples of docstrings."""

import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files, config):
    """Add README.md and the other pages of the root as pages, and the examples and the licence as files to load."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("examples/*.py"), ROOT / "LICENSE", ROOT / "CITATION.cff"]:
        files.append(
            File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, use_directory_urls=config.use_directory_urls)
        )
    return files


def on_page_markdown(markdown, page, **_):
    """Make the links of the repository links of the site, which has the root and docs/ in one folder."""
    return re.sub(r"\]\((?:docs|\.\.)/", "](", markdown)


def on_post_page(output, page, **_):
    """Refuse a page that loads a script, a style or an image from elsewhere."""
    loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?https?:[^\s>]*", output)
    loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*https?:[^\s>]*", output)
    if loaded:
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {loaded}")
    return output


class Docstrings(griffe.Extension):
    """Adapt the docstrings to what griffe reads."""

    def on_object(self, *, obj, **_):
        """Fence each paragraph that begins with `>>>`, and keep names that share a description together."""
        if obj.docstring:
            text = re.sub(r"^>>> .*(?:\n.+)*", r"```pycon\n\g<0>\n```", obj.docstring.value, flags=re.MULTILINE)
            shared = re.compile(r"^ +\w+(?:, \w+)+: ", re.MULTILINE)
            obj.docstring.value = shared.sub(lambda names: names[0].replace(", ", ",\N{NO-BREAK SPACE}"), text)
