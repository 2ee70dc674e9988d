"""What the scripts share that compare what is written with other programs' readers."""
