"""The recipes are commands, not a package: their folder has to be on the path."""

import sys
from pathlib import Path

RECIPES = Path(__file__).parent.parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))
