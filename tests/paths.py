"""Where things are in a checkout."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS, RECIPES = REPOSITORY / "tools", REPOSITORY / "recipes"
