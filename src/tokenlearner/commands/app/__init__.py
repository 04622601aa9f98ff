"""`tokenlearner app`: a web page that shows where learned tokens look."""
