"""How fast training is: real steps measured at any layout, and beside TRL's trainer."""
