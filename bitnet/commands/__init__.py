"""One module a command: its options on top, the work imported when it runs.

train.py and generate.py stand at the top of the repository, where people read and run them. A wheel has them in this
folder (setup.py puts them here), a clone finds them above.
"""

from pathlib import Path

if not (Path(__file__).parent / "train.py").exists():
    __path__.append(str(Path(__file__).parents[2]))
