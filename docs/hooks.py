"""The pages read the same in the repository and as a site: what links out of docs/ is copied or becomes text."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    for picture in (ROOT / "examples" / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = markdown.replace("../examples/benchmarks/results/", "results/")
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
