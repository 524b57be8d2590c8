"""The commands of `python -m bitnet`: options on top, the work imported where it is done."""
