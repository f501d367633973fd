"""The house's rules (CONTRIBUTING.md): which way imports go, what is pure, and how long a file may be."""

import subprocess
import sys

from tests.repository import PACKAGE, ROOT, circles, import_graph, source_files

DOORS = ("cli", "pretrain", "collect_keys", "rehearse", "layer_spec")  # what a command line names
PURE = ("config", "expert_layers", "data", "initialisation", "hf.name_table", "planning")
PURE += ("routers.config", "routers.kinds", "routers.fold")
NOT_PURE = ("planning.rehearsal",)
MAIN_PATH = ("config", "routers", "initialisation", "key_statistics", "conversion")
MAIN_PATH += ("training.launch", "training.train")
# What needs Megatron, in folders whose other files are pure.
UPPER_FLOORS = (*NOT_PURE, *(f"routers.{name}" for name in ("base", "baselines", "mixture")))
LONGEST_FILE, LONGEST_MAIN_PATH = 400, 4000
# Folders of tests that mirror no room of the package.
OTHER_TESTS = {"tools", "scripts", "reference", "pretend_gpu", "engines"}

MODULES = source_files(PACKAGE)
LINES = {module: len(path.read_text("utf-8").splitlines()) for module, path in MODULES.items()}


def within(module: str, names: tuple[str, ...]) -> bool:
    """Whether ``module`` is one of ``names`` or lies in it."""
    return any(f"{module}.".startswith(f"{PACKAGE}.{name}.") for name in names)


def room_of(module: str) -> str:
    """A folder or file of the package; an upper floor counts as a room of its own."""
    parts = module.split(".")[1:]
    if within(module, UPPER_FLOORS):
        return f"{parts[0]}, upper floor"
    return parts[0] if parts else "public names"


def test_no_file_imports_one_that_imports_it() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}, "f": {"a", "d"}}
    assert circles(graph) == [["a", "b", "c"], ["e"]]
    # Imports inside functions count.
    assert f"{PACKAGE}.diagnostics.checkpoint" in import_graph(PACKAGE)[f"{PACKAGE}.commands.inspect"]
    assert circles(import_graph(PACKAGE, "tools")) == []


def test_no_room_imports_one_that_imports_it() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in import_graph(PACKAGE).items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, others))
    assert circles({room: others - {room} for room, others in rooms.items()}) == []


def test_nobody_imports_doors_and_commands_nor_the_package_tools_and_tests() -> None:
    for module, others in import_graph(PACKAGE, "tools", "tests", "examples").items():
        if module in MODULES:
            assert not others - set(MODULES), module
        if not module.startswith("tests"):
            assert not [other for other in others if within(other, DOORS)], module
            if not within(module, ("cli", "commands")):
                assert not [other for other in others if within(other, ("commands",))], module


PURE_MODULES = [module for module in MODULES if within(module, PURE) and not within(module, NOT_PURE)]
# Here Megatron and its kin cannot be imported, nor CUDA be started. The last two modules need Megatron.
IMPORT_BLOCKED = """
import importlib, importlib.abc, sys, torch

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"megatron", "transformer_engine", "apex", "transformers"}:
            raise ImportError(f"{name} is blocked")

def refuse(*args, **options):
    raise AssertionError("CUDA is blocked")

sys.meta_path.insert(0, Blocker())
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
*pure, router, patches = sys.argv[1:]
for module in pure:
    importlib.import_module(module)
for module in (router, patches):
    try:
        importlib.import_module(module)
    except ImportError as error:
        assert "megatron" in str(error) and "is blocked" in str(error), error
    else:
        sys.exit(f"{module} was imported")
"""


def test_pure_rooms_need_neither_megatron_nor_cuda() -> None:
    for name in PURE:
        assert [module for module in PURE_MODULES if within(module, (name,))], f"{name} is not there"
    impure = (f"{PACKAGE}.routers.mixture", f"{PACKAGE}.training.patches.layers")
    command = [sys.executable, "-c", IMPORT_BLOCKED, *PURE_MODULES, *impure]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr


def test_records_and_tables_of_names_need_nothing_heavy() -> None:
    modules = (f"{PACKAGE}.{name}" for name in ("hf.name_table", "hf.architecture", "data.record as record"))
    heavy = {"torch", "numpy", "megatron.core", "transformers", "pyarrow"}
    code = "".join(f"import {module}\n" for module in modules) + "record.read(record.Path('x'))\n"
    code += f"import sys; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_no_file_is_long_and_the_main_path_is_read_in_an_hour() -> None:
    long = {module: count for module, count in LINES.items() if count > LONGEST_FILE}
    assert not long, f"over {LONGEST_FILE} lines: {long}"
    path = {module: count for module, count in LINES.items() if within(module, MAIN_PATH)}
    for name in MAIN_PATH:
        assert any(within(module, (name,)) for module in path), f"{name} is not there"
    assert sum(path.values()) < LONGEST_MAIN_PATH, path


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    tests = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")} - OTHER_TESTS
    assert tests <= rooms, f"mirror no room: {tests - rooms}"
    assert rooms <= tests, f"have no tests: {rooms - tests}"
