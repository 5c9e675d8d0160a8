"""A seeded fuzz of every reader and every number flag: one good input is damaged a case, and a command reads it.

python -m tests.fuzz --seed 0 --cases 600

Modules: `inputs` makes good inputs, `commands` has good command lines, `damage` spoils files, `readers` and `targets`
list what can be spoilt, `case` runs a command and judges what it did, `__main__` sends cases to a child process and
prints what came of them.
"""
