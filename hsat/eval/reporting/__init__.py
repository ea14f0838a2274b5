"""What people look at: figures, the HTML page, the tables of the paper."""
