"""What is wrong with a bucket for a shared cache: no rule that removes, no TLS, a clock that is off.

obstore reads and writes objects and knows no lifecycle; this asks for it by one signed request (AWS Signature 4).
"""

import email.message
import email.utils
import hashlib
import hmac
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

from kvstore.shared.addresses import S3Url, is_loopback

CLOCK_MAX_S = 60.0
"""S3 refuses requests that are 15 minutes off; a minute says that NTP does not run."""
_ANSWER_MAX_NBYTES = 1 << 20
_NOTHING = hashlib.sha256(b"").hexdigest()


def complaints(url: S3Url, credentials: Mapping[str, str], now: Callable[[], float], timeout_s: float) -> list[str]:
    """A sentence for each fault that can be found. now: Unix seconds."""
    found = []
    parts = urlsplit(url.endpoint)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        found.append(f"records cross the network in clear: {url.endpoint} is no https endpoint")
    if "access_key_id" not in credentials or not url.endpoint:
        found.append(
            "the bucket's lifecycle rules cannot be checked without credentials_file and an endpoint in the url"
        )
        return found
    try:
        status, text, date = _ask_lifecycle(url, credentials, now(), timeout_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return [*found, f"the bucket's lifecycle rules cannot be checked: {error}"]
    if date and abs(date - now()) > CLOCK_MAX_S:
        found.append(
            f"S3's clock is {date - now():+.0f} s from this host's, at most {CLOCK_MAX_S:.0f} s: set it by NTP"
        )
    if status == http.client.OK:
        if not _removes(text, url.prefix):
            found.append(_no_rule(url))
    elif status == http.client.NOT_FOUND:
        found.append(_no_rule(url))
    else:
        found.append(f"the bucket's lifecycle rules cannot be checked: the server answers {status}")
    return found


def _no_rule(url: S3Url) -> str:
    return (
        f"bucket {url.bucket} has no lifecycle rule that expires {url.prefix or 'its objects'}: nothing is ever "
        "removed; add one of at least a day"
    )


def _ask_lifecycle(
    url: S3Url, credentials: Mapping[str, str], now: float, timeout_s: float
) -> tuple[int, bytes, float]:
    """Status, body and the server's time (0: not told). Raises OSError and http.client.HTTPException."""
    host = urlsplit(url.endpoint).netloc
    path = f"/{url.bucket}"
    if not url.path_style:
        host, path = f"{url.bucket}.{host}", "/"
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": host, "x-amz-content-sha256": _NOTHING, "x-amz-date": stamp}
    if credentials.get("session_token"):
        headers["x-amz-security-token"] = credentials["session_token"]
    headers["authorization"] = _signature(path, headers, credentials, url.region or "us-east-1", stamp)
    scheme = urlsplit(url.endpoint).scheme
    request = urllib.request.Request(f"{scheme}://{host}{path}?lifecycle=", headers=headers)  # noqa: S310 - http or https, checked
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310 - the same
            return answer.status, answer.read(_ANSWER_MAX_NBYTES), _date(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b"", _date(error.headers)


def _signature(path: str, headers: Mapping[str, str], credentials: Mapping[str, str], region: str, stamp: str) -> str:
    names = ";".join(sorted(headers))
    canonical = "\n".join(
        ["GET", path, "lifecycle=", *(f"{name}:{headers[name]}" for name in sorted(headers)), "", names, _NOTHING]
    )
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{credentials['secret_access_key']}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    signed = hmac.new(key, text.encode(), "sha256").hexdigest()
    return (
        f"AWS4-HMAC-SHA256 Credential={credentials['access_key_id']}/{scope}, SignedHeaders={names}, Signature={signed}"
    )


def _date(headers: email.message.Message) -> float:
    try:
        return email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _removes(text: bytes, prefix: str) -> bool:
    """Whether a rule is on that expires all objects under a prefix."""
    try:
        rules = ET.fromstring(text).iter()  # noqa: S314 - the operator's own S3, at most 1 MiB
    except ET.ParseError:
        return False
    for rule in rules:
        if rule.tag.rpartition("}")[2] != "Rule":
            continue
        told = {element.tag.rpartition("}")[2]: (element.text or "").strip() for element in rule.iter()}
        expires = "Expiration" in told and ("Days" in told or "Date" in told)
        if told.get("Status") == "Enabled" and expires and f"{prefix}/".startswith(told.get("Prefix", "")):
            return True
    return False
