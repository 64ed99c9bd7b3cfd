from pathlib import Path
def require_report_extra(): pass
def write_report(results, output): return output / "report.html"
