import re
from pathlib import Path

from dpt.config import TrainConfig
from dpt.typed_yaml import config_keys

DOCS = [Path("README.md"), *Path("docs").glob("*.md")]


def test_every_setting_that_the_documentation_names_exists(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    known = config_keys(TrainConfig)
    sections = {key.split(".")[0] for key in known if "." in key}
    named = set()
    for path in (*DOCS, *Path("configs").glob("*/*.yaml")):
        text = path.read_text()
        named |= {
            m
            for m in re.findall(r"\b([a-z_]+(?:\.[a-z0-9_]+)+)(?==|`)", text)
            if m.split(".")[0] in sections and not m.endswith(".py")
        }
    assert len(named) > 30
    assert sorted(named - set(known)) == []


def test_every_file_that_the_readme_names_exists(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    text = Path("README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    modules = [f"{name.replace('.', '/')}" for name in re.findall(r"python -m (dpt(?:\.[a-z_]+)+)", text)]
    assert links
    assert modules
    for link in links:
        assert Path(link).exists(), link
    for module in modules:
        assert Path(f"{module}.py").exists() or Path(module, "__main__.py").exists(), module
    for config in re.findall(r"configs/[a-z0-9_/]+\.yaml", text):
        assert Path(config).exists(), config


def test_no_placeholder_is_left(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    for path in DOCS:
        assert re.findall(r"@[A-Z]+@", path.read_text()) == [], path
