import pytest

from moerouters.registry.api import ApiFit, api_fit


@pytest.mark.parametrize(
    ("written_for", "host", "fit"),
    [
        ("0.1", "0.1", ApiFit.FITS),
        ("0.2", "0.1", ApiFit.TOO_NEW),
        ("0.1", "0.2", ApiFit.TOO_OLD),  # major 0 promises nothing across minors
        ("1.0", "0.1", ApiFit.TOO_NEW),
        ("0.9", "1.0", ApiFit.TOO_OLD),
        ("1.0", "1.0", ApiFit.FITS),
        ("1.0", "1.3", ApiFit.FITS),
        ("1.4", "1.3", ApiFit.TOO_NEW),
        ("1.10", "1.9", ApiFit.TOO_NEW),  # numbers, not texts
        ("1.9", "1.10", ApiFit.FITS),
        ("1.9", "2.0", ApiFit.TOO_OLD),
    ],
)
def test_gate(written_for: str, host: str, fit: ApiFit) -> None:
    assert api_fit(written_for, host) is fit
