"""What the application keeps."""

ENTRIES = {}
COUNTS = {}
LETTERS = []
TOTALS = []


def clear():
    for each in (ENTRIES, COUNTS, LETTERS, TOTALS):
        each.clear()
