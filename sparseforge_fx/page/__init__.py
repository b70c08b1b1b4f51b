"""``report.html``: one page of a run that can be mailed, from the files that lie in the run's folder."""
