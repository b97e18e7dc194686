"""The site: `sphinx-build -W docs build/site`, from a clone with `pip install -e ".[docs]"`.

It needs no network, and nothing of cflow but the core.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from docutils.utils.math.unichar2tex import uni2tex_table
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)
DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]


project = "cflow"
author = "The cflow developers"
version = release = importlib.import_module("cflow").__version__
copyright = "The cflow developers, Apache-2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"cflow {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.png"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sourcelink = False
exclude_patterns = ["generated/*"]  # parts of pages

# Notebooks are shown as they are stored: what they show took minutes, and `pytest --nbmake examples` runs them.
nb_execution_mode = "off"
# what a notebook stores of progress bars and widgets has no place on a page
nb_output_stderr = "remove"
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # `PotentialFlow` in a docstring is a link
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr, field, fields, derivation, terms"}
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("SelectionLike", "TimesLike", "Constant", "Extent", "Transformation")}
add_module_names = False
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are described where the class is, each once
napoleon_use_admonition_for_examples = False
napoleon_use_rtype = False

TORCH = "https://docs.pytorch.org/docs/stable/"


def torch_page(target: str) -> str | None:
    """Where PyTorch's documentation has a name: an inventory would have to be fetched at each build."""
    if target in ("Tensor", "torch.Tensor"):
        return f"{TORCH}tensors.html"
    if target in ("Distribution", "Transform") or target.startswith("torch.distributions"):
        return f"{TORCH}distributions.html"
    if target in ("nn.Module", "Module", "torch.nn.Module"):
        return f"{TORCH}generated/torch.nn.Module.html"
    if target in ("torch.compile", "torch.no_grad", "torch.inference_mode"):
        return f"{TORCH}generated/{target}.html"
    return None


def find_name(app: Sphinx, env: BuildEnvironment, node: nodes.Element, contnode: nodes.Element) -> nodes.Element | None:
    """Docstrings say `PotentialFlow` wherever they are, and name what is PyTorch's."""
    target, page = node.get("reftarget", ""), torch_page(node.get("reftarget", ""))
    if page is not None:
        return nodes.reference("", "", contnode, internal=False, refuri=page)
    if target.split(".")[0] not in importlib.import_module("cflow").__all__:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"cflow.{target}", node, contnode)


# Docstrings write formulas in plain letters, so that they can be read in a terminal; these mean more in TeX.
LETTERS = {
    "Σ": r"\sum ",
    "Π": r"\prod ",
    "∫": r"\int ",
    "½": r"\frac12 ",
    "…": r"\ldots ",
    "·": r"\cdot ",
    "°": r"^\circ ",
    r"\dots": r"\ldots",
}
LETTERS |= {letter: f"^{power}" for letter, power in {"²": "2", "ᵀ": "T"}.items()} | {r"\big": ""}
FRACTION = re.compile(r"\\[td]?frac\s*(\w)\s*(\w)")  # TeX reads one sign for each part, docutils a whole number
NAME = re.compile(r"(\\(?:log|det|exp|sin|cos|tanh|cosh))(?![A-Za-z])\s*(?=[A-Za-z\\Σ])")  # docutils sets it tight
# a command with its argument, or a word, which is a name and not a product of letters
WORD = re.compile(
    r"(\\(?:text|mathrm|mathbb|mathcal|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+)|([A-Za-z]{3,}|KL|tr)"
)


def mathml(node: nodes.Element, *, block: bool) -> str:
    """A formula as MathML, which browsers draw themselves: no script, no font and no network."""
    tex = node.astext()
    for letter, command in LETTERS.items():
        tex = tex.replace(letter, command)
    tex = re.sub(r"(?<=\w) (?=\\log)", r"\\,", NAME.sub(r"\1\\,", tex))
    tex = FRACTION.sub(r"\\frac{\1}{\2}", tex)
    tex = WORD.sub(lambda found: found[1] or rf"\mathrm{{{found[2]}}}", tex).translate(uni2tex_table)
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        logger.warning("no MathML for %r: %s", tex, error, location=node)
        return tex


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node, block=True)}</div>')
    raise nodes.SkipNode


def plain_marks(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings say |dt| and (…, *image), which reStructuredText would take for marks of its own."""
    in_formula = False
    for i, line in enumerate(lines):
        in_formula = line.lstrip().startswith(".. math::") or (in_formula and line.startswith(" "))
        if not in_formula and not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(?<!\\)\|", r"\|", re.sub(r"\*(\w+)(?=[,)])", r"\*\1", line))


def tidy_examples(app: Sphinx, name: str, source: list[str]) -> None:
    """A doctest ends with an empty line, which nobody needs to see."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def plain_aliases(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Names of types that stand for many, as the code has them."""
    plain = [re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) if text else text for text in (signature, returns)]
    return plain[0], plain[1]


def bring_pages(app: Sphinx, config: object) -> None:
    """Sphinx reads one folder: the notebooks are in another, and tables of results are written anew."""
    importlib.import_module("generated").main()
    folder = DOCS / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "examples", folder, ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")])


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None))
    app.connect("config-inited", bring_pages)
    app.connect("autodoc-process-docstring", plain_marks)
    app.connect("autodoc-process-signature", plain_aliases)
    app.connect("source-read", tidy_examples)
    app.connect("missing-reference", find_name)


html_math_renderer = "mathml"
