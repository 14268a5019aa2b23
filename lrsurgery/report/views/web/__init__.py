"""What the HTML page is made of: sentences and tiles in Python, and the script and style that draw."""
