"""`mbx verify ci`: a matrix of conversion checks."""
