from dpt.results import record_section


def test_a_section_replaces_the_one_of_its_name(tmp_path, capsys):
    path = tmp_path / "results.md"
    for text in ("first", "second \\1"):
        record_section(path, "a (x)", "python -m a", text)
        record_section(path, "b", "python -m b", "other")
    content = path.read_text()
    assert content.startswith("# Results\n\n<!-- begin a (x) -->\n`python -m a`, recorded at commit ")
    assert content.count("begin a (x)") == content.count("begin b") == 1
    assert "second \\1" in content
    assert "first" not in content
    assert f"recorded in {path}, section 'a (x)'" in capsys.readouterr().out
