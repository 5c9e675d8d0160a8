from dpt.results import markdown_table, record_section


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


def test_wide_tables_are_recorded_as_several(tmp_path):
    path, wide = tmp_path / "results.md", [f"c{k}" for k in range(11)]
    text = "before\n\n" + markdown_table(wide, [["a", *range(10)], ["b", *range(10)]]) + "\nafter\n"
    record_section(path, "a", "python -m a", text)
    assert "| c0 | c1 | c2 | c3 | c4 | c5 | c6 | c7 | c8 |\n" in path.read_text()
    assert "\n\n| c0 | c9 | c10 |\n| --- | --- | --- |\n| a | 8 | 9 |\n| b | 8 | 9 |\n\nafter\n" in path.read_text()
