"""What a person or a CI job reads of a run: one HTML page, Markdown for a job summary, JUnit XML of the gates."""
