"""The shape of the house: who imports whom, and how long a function may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "captum_attn"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MAX_FUNCTION_LINES = 60

# Part -> the parts of the package that it may import, itself aside.
MAY_IMPORT = {
    "errors": set(),
    "_checks": {"errors"},
    "objectives": {"_checks", "errors"},
    "observe": {"_checks", "errors"},
    "attr": {"observe", "_checks", "errors", "objectives"},
    "_detector": {"observe", "_checks", "errors"},
    "detection": {"_detector", "attr", "observe", "_checks", "errors"},
    "_prompt": {"observe", "_checks", "errors"},
    "generation": {"_prompt", "attr", "observe", "_checks", "errors", "objectives"},
    "intervene": {"observe", "_checks", "errors"},
    "metrics": {"intervene", "_checks", "errors"},
    "visualization": {"_checks", "_pictures", "errors"},
    "_pictures": {"_checks", "errors"},
    "_on_demand": set(),
    "_method_names": {"metrics", "_checks", "errors"},
    "evaluation": {
        "metrics", "objectives", "_method_names", "_on_demand", "_pictures", "_checks", "errors",
    },
    "insights": {
        "attr", "observe", "detection", "metrics", "visualization", "_method_names", "_on_demand",
        "_pictures", "_checks", "errors",
    },
    "explain": {
        "attr", "generation", "evaluation", "metrics", "visualization", "_checks", "errors",
    },
    "toy": {"_checks", "errors"},
    "cli": {"demo", "evaluation", "insights", "explain", "_checks", "errors"},
}  # fmt: skip
MODEL_LIBRARIES = {"transformers", "timm"}
HELPERS = ("_detector", "detection", "_prompt", "generation")
# What `captum-attn evaluate` adds to `evaluate`: models by name, the package's own among them;
# `captum-attn dashboard` opens the dashboard on them.
COMMAND = {"evaluation/command.py", "evaluation/embedded.py", "evaluation/models.py",
           "insights/toys.py"}  # fmt: skip
EXTRAS = {"typer", "tqdm", "matplotlib", "PIL", "sklearn", "safetensors", "torchvision"}


def part(module: str) -> str:
    """``attr/rollout.py`` -> ``attr``, ``errors.py`` -> ``errors``."""
    return module.split("/")[0].removesuffix(".py")


def names_imported_by(path: Path, package: str = "captum_attn") -> set[str]:
    """Every imported module as a dotted name, also inside functions; relative ones resolved."""
    found: set[str] = set()
    where = [package, *path.relative_to(PACKAGE).parent.parts] if PACKAGE in path.parents else []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = where[: len(where) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            found.update(f"{stem}.{alias.name}" for alias in node.names)
    return found


def parts_imported_by(module: str) -> set[str]:
    names = names_imported_by(PACKAGE / module)
    inside = {name.split(".")[1] for name in names if name.startswith("captum_attn.")}
    return inside - {part(module)}


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) in MAY_IMPORT])
def test_imports_run_one_way(module):
    more = {"demo", "toy"} if module in COMMAND else set()
    assert parts_imported_by(module) <= MAY_IMPORT[part(module)] | more


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "evaluation"])
def test_an_evaluation_needs_no_model_library_and_no_extra_to_be_imported(module):
    path = PACKAGE / module
    if module not in COMMAND:
        assert not {name.split(".")[0] for name in names_imported_by(path)} & MODEL_LIBRARIES
        own = {f"captum_attn.{file.removesuffix('.py').replace('/', '.')}" for file in COMMAND}
        assert not any(name.startswith(tuple(own)) for name in names_imported_by(path))
    body = ast.parse(path.read_text(encoding="utf-8")).body
    above = {a.name for node in body if isinstance(node, ast.Import) for a in node.names}
    above |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
    allowed = {"typer"} if module == "evaluation/command.py" else set()
    assert not {name.split(".")[0] for name in above} & (EXTRAS | MODEL_LIBRARIES) - allowed


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) in ("observe", "attr", *HELPERS)])
def test_the_engine_knows_no_model_library(module):
    tops = {name.split(".")[0] for name in names_imported_by(PACKAGE / module)}
    assert not tops & MODEL_LIBRARIES


def method_files() -> list[str]:
    """Files of ``attr`` that hold a method; shared ones begin with an underscore."""
    return [m for m in MODULES if part(m) == "attr" and not Path(m).name.startswith("_")]


def test_methods_do_not_import_each_other():
    stems = {Path(module).stem for module in method_files()}
    for module in method_files():
        names = names_imported_by(PACKAGE / module)
        others = {name.split(".")[2] for name in names if name.startswith("captum_attn.attr.")}
        assert not others & (stems - {Path(module).stem}), module


# of `observe`, in order
ROOMS = ("capture", "operators", "tracing", "streams", "observation", "vectors")


@pytest.mark.parametrize("module", [m for m in MODULES if m.count("/") and part(m) == "observe"])
def test_the_rooms_of_observe_import_one_way(module):
    room = module.split("/")[1].removesuffix(".py")
    before = set(ROOMS[: ROOMS.index(room) + 1]) if room in ROOMS else set(ROOMS)
    names = names_imported_by(PACKAGE / module)
    inside = [name for name in names if name.startswith("captum_attn.observe.")]
    assert {name.split(".")[2] for name in inside} <= before


def foreign_secrets(path: Path) -> set[str]:
    """Underscored modules that a file imports from a room that it is not in."""
    own = (
        ["captum_attn", *path.relative_to(PACKAGE).parent.parts] if PACKAGE in path.parents else []
    )
    found = set()
    for name in names_imported_by(path):
        parts = name.split(".")
        for i, step in enumerate(parts):
            is_file = (PACKAGE.parent / "/".join(parts[: i + 1])).with_suffix(".py").is_file()
            if parts[0] == "captum_attn" and step[0] == "_" and is_file and own[:i] != parts[:i]:
                found.add(name)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_underscored_modules_stay_in_their_room(module):
    assert not foreign_secrets(PACKAGE / module)


def test_the_check_of_underscored_modules_finds_one(tmp_path):
    text = "from captum_attn.attr._run import Run\nfrom captum_attn import _pictures, __version__\n"
    (tmp_path / "outside.py").write_text(text)
    assert foreign_secrets(tmp_path / "outside.py") == {
        "captum_attn.attr._run.Run", "captum_attn._pictures",
    }  # fmt: skip


def test_a_method_reads_like_its_paper():
    """GAE needs few words of the engine: a newcomer reads its file without the others."""
    names = names_imported_by(PACKAGE / "attr" / "generic_attention.py")
    names = {name for name in names if not name.startswith("__future__")}
    assert len(names) <= 8
    assert len({name.rpartition(".")[0] for name in names}) <= 4


def test_rooms_export_what_is_documented():
    import captum_attn.attr
    import captum_attn.observe

    methods = {n for n in captum_attn.__all__ if isinstance(getattr(captum_attn, n), type)}
    attr, observe = set(captum_attn.attr.__all__), set(captum_attn.observe.__all__)
    assert attr == (methods - {"AttnError"}) | {"AttentionAttribution", "Block", "Result", "Run"}
    assert observe == {"AttentionCall", "Block", "Observation", "observe"}


def test_nothing_needs_the_command_line():
    for module in MODULES:
        assert "cli" not in parts_imported_by(module), module


def test_only_the_demo_needs_its_extra():
    for module in MODULES:
        if part(module) in ("errors", "objectives", "observe", "attr", *HELPERS):
            tops = {name.split(".")[0] for name in names_imported_by(PACKAGE / module)}
            assert not tops & EXTRAS, module


def long_functions(path: Path) -> list[str]:
    """Functions whose body, the docstring aside, is longer than `MAX_FUNCTION_LINES`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 > MAX_FUNCTION_LINES:
                found.append(node.name)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_functions_stay_short(module):
    assert not long_functions(PACKAGE / module)


def test_relative_imports_are_resolved():
    """The checks above would pass on anything if they could not read imports."""
    names = names_imported_by(PACKAGE / "demo" / "command.py")
    assert {"captum_attn.errors.InputError", "captum_attn.demo.report.write_report"} <= names
    assert "typer" in names
    digit_vit = names_imported_by(PACKAGE / "toy" / "digit_vit.py")
    assert "captum_attn.toy.scenes.IMAGE_SIZE" in digit_vit
    assert len(MODULES) > 10
