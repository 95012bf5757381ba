"""Files and text from outside: held open, checked for changes, and made safe to print. No numpy beyond byte views."""
