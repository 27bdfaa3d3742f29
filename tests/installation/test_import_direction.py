"""Who may import whom, and what `import extrope_kernels` may not load."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import extrope_kernels
from extrope_kernels.ops import attention, rope

PACKAGE = "extrope_kernels"
ROOT = Path(extrope_kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Every module is of one kind, that of the first pattern that fits its path. Operations, their
# implementations and integrations are found by where they are, whatever their names.
KINDS = {
    "package": r"((ops|integrations)/)?__init__.py",
    "axis": r"(methods|positions|scores)/.*",
    "checks": r"_(checks|names|coming_from|rope_types).py",
    "installation": r"_[a-z]\w*.py",
    "torch": r"ops/_torch/.*",
    "math": r"ops/_math/.*",
    "tables": r"ops/_tables/.*",
    "operation": r"ops/\w+/.*",
    "distributed": r"distributed/.*",
    "client": r"(integrations/\w+|evaluation|model_check)/.*|(cli|__main__|testing).py",
}
AXES = ("methods", "positions", "scores")
# What each kind may import of the package. {own} is the module's own folder: methods/, ops/rope/.
MAY_IMPORT = {
    "package": (*AXES, "ops", "_names"),
    "axis": ("{own}", "_checks", "_names", "_rope_types"),
    "checks": ("_coming_from", "_rope_types"),
    "installation": ("_build",),
    "torch": ("{own}", "_ext"),
    "math": ("{own}", "ops/_torch", *AXES),
    "tables": ("{own}", "ops/_math", "ops/_torch", *AXES),
    "operation": ("{own}", "ops/_tables", "ops/_math", "ops/_torch", *AXES, "_ext", "_names"),
    "distributed": (
        "{own}",
        "ops/_tables",
        "ops/_math",
        "ops/_torch",
    ),  # and public names, see below
    "client": (
        "_build",
        "_checks",
        "_ext",
        "_names",
        "_rope_types",
        "_usage",
    ),  # likewise, and clients before them
}
# Clients in order: each imports those before it alone.
CLIENTS = (r"integrations/_shared", r"integrations", r"evaluation", r"model_check", r"cli|__main__")
# Operations in order: each imports those before it alone. PermuteFormer stands beside them.
OPERATIONS = ("ops/rope", "ops/cache", "ops/attention", "ops/decode")
BACKENDS = {*rope.backends(), *attention.backends()}
REQUIRED = {
    re.match(r"\w+", need)[0]
    for need in importlib.metadata.requires("extrope-kernels")
    if "extra ==" not in need
}


def inside(path):
    """The path below the package, without .py: methods/yarn, ops/rope for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "/".join(parts).removesuffix("__init__").rstrip("/")


def kind_of(path):
    found = path.relative_to(ROOT).as_posix()
    return next((name for name, pattern in KINDS.items() if re.fullmatch(pattern, found)), None)


def own_folder(path):
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[: 2 if parts[0] in ("ops", "integrations") else 1])


def backend(path):
    """The backend that a module of an operation implements, told by its file's or folder's name."""
    first = path.relative_to(ROOT).parts[2].removesuffix(".py")
    return next((name for name in BACKENDS if re.search(rf"(^|_){name}(_|$)", first)), None)


def absolute(node, path):
    """The modules that an import statement names: methods/yarn within the package, else torch."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        folder = [PACKAGE, *path.relative_to(ROOT).parts[:-1]]
        base = folder[: len(folder) - node.level + 1] if node.level else []
        source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        names = [source]
        if source.split(".")[0] == PACKAGE:
            # `from package import submodule` names the submodule.
            names = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else source for name in names]
    return [name.replace(".", "/") for name in names]


def is_module(name):
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def imports(path, at_import_time=False):
    """Yield what a file imports, as `absolute` names it."""
    stack = [tree_of(path)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from absolute(node, path)
        elif at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
        else:
            stack.extend(ast.iter_child_nodes(node))


def own_imports(path):
    """What a file imports of the package: methods/yarn, or "" for the package itself."""
    for name in imports(path):
        if name.split("/")[0] == PACKAGE:
            yield name.removeprefix(PACKAGE).lstrip("/")


def under(name, folder):
    return f"{name}/".startswith(f"{folder}/")


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_a_kind_import_what_that_may(kind):
    for path in FILES:
        if kind_of(path) != kind:
            continue
        allowed = [rule.format(own=own_folder(path)) for rule in MAY_IMPORT[kind]]
        if own_folder(path) in OPERATIONS:
            allowed += OPERATIONS[: OPERATIONS.index(own_folder(path))]
        for name in own_imports(path):
            fits = any(under(name, rule) for rule in allowed)
            if kind in ("distributed", "client"):
                fits |= is_public(name) or kind_of(file_of(name)) in ("distributed", "client")
            assert fits, f"{kind} {inside(path)} imports {name or PACKAGE}"


def client(name):
    """The place of a client among CLIENTS; that of testing, which all tests use, is the first."""
    found = (n for n, each in enumerate(CLIENTS) if re.match(rf"({each})(/|$)", name))
    return next(found, 0)


def test_clients_import_those_before_them():
    for path in FILES:
        if kind_of(path) == "client":
            for name in own_imports(path):
                assert client(name) <= client(inside(path)), f"{inside(path)} imports {name}"


def test_every_module_is_of_a_kind():
    """Or say in KINDS what it is, and what that may import."""
    assert not [inside(path) for path in FILES if kind_of(path) is None]


def is_public(name):
    """The package, an axis or an operation as a whole."""
    return name in ("", *AXES) or bool(re.fullmatch(r"ops/[a-z]\w*", name))


def file_of(name):
    path = ROOT / name
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_implementations_import_neither_one_another_nor_the_public_functions():
    for path in FILES:
        if kind_of(path) != "operation" or not backend(path):
            continue
        here, folder = backend(path), own_folder(path)
        for name in own_imports(path):
            assert not under(name, f"{folder}/api"), f"{inside(path)} imports {name}"
            if under(name, folder) and name != folder:
                assert backend(ROOT / name) in (None, here), f"{inside(path)} imports {name}"


def test_optional_packages_are_imported_inside_functions():
    known = {PACKAGE, "extrope_cli", *REQUIRED, *sys.stdlib_module_names}
    for path in FILES:
        tops = {name.split("/")[0] for name in imports(path, at_import_time=True)} - known
        in_their_folders = {"lm_eval", "triton", "vllm"} & {*path.parent.parts}
        assert tops <= in_their_folders, inside(path)


def test_one_module_uses_private_functions_of_torch():
    private = r"torch\._(C|functorch|dynamo)\b|_dynamo_marked_constant|forward_ad\._|_SingleLevel"
    found = {inside(path) for path in FILES if re.search(private, path.read_text())}
    assert found == {"ops/_torch/autograd"}


def test_importing_the_package_loads_no_optional_package():
    loaded = "{name.split('.')[0] for name in sys.modules}"
    code = (
        f"import sys, torch, filelock; before = {loaded}\n"
        f"import {PACKAGE}, {PACKAGE}.cli, {PACKAGE}.integrations.transformers\n"
        f"print(*sorted({loaded} - before - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [PACKAGE], done.stdout
