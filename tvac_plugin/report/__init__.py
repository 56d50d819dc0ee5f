"""Views of results: tables for a terminal and pages to send; they compute nothing that is not in the results."""
