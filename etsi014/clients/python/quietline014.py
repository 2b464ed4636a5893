#!/usr/bin/env python3
"""Draw and collect keys from a QKD key manager (KME) over ETSI GS QKD 014.

One file, Python 3.9 or newer, nothing but the standard library.

    import quietline014
    kme = quietline014.Client(["https://kme.example:8443"],
                              cert="app.crt", key="app.key", ca="kme-ca.crt")
    with kme.enc("other-app", number=2, size=256) as keys:   # draw new keys
        for k in keys:
            use(k.id, k.bits)                                # bits is a bytearray
    with kme.dec("other-app", [key_id]) as keys: ...         # collect keys by key_ID

A caller must keep in mind: a key leaves the KME once, so a repeated enc draws
another key and a lost answer is a lost key. The client therefore goes on to
the next address only while no connection came up. Sizes are bits. Leaving the
with block, or clear(), overwrites the keys with zeros; CPython may keep copies
in buffers of its own (decoder, TLS) that no program can reach.
"""

import argparse
import base64
import binascii
import collections
import http.client
import json
import os
import re
import socket
import ssl
import sys
import threading
import time
import urllib.parse

MAX_ANSWER = 1 << 20  # bytes: 1,024 keys of 4,096 bits need 780 KiB
IDLE = 90  # seconds, less than the two minutes after which KMEs close

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)
_KEY = re.compile(rb'"key"\s*:\s*"((?:[A-Za-z0-9+/=]|\\/)*)"')
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


class Error(Exception):
    """A call that brought no keys.

    code is the HTTP status, 0 when no answer came. message and details are the
    KME's own. lost says that a request left and its answer did not arrive
    whole: keys it may have carried are gone.
    """

    def __init__(self, message, code=0, details=(), retry_after=None, lost=False):
        self.message, self.code, self.details = message[:300], code, details
        self.retry_after, self.lost = retry_after, lost  # retry_after: seconds or None
        super().__init__(("%d: " % code if code else "") + self.message)


class BadRequest(Error):
    """The request breaks a rule (400, 404, 405 ...)."""


class UnknownKey(Error):
    """A key_ID is not, or no longer, at this KME (400; some say 404)."""


class Denied(Error):
    """The KME does not take our certificate, or the keys are another's (401)."""


class Empty(Error):
    """Not enough key now (503); missing_bits tells how much, 0 = not told."""

    missing_bits = 0


class Down(Error):
    """The KME cannot be reached, cannot serve, or answered nonsense."""


class Key:
    """One key: id is its key_ID, bits a bytearray that clear() wipes."""

    __slots__ = ("id", "bits")

    def __init__(self, id, bits):
        self.id, self.bits = id, bits

    def clear(self):
        for i in range(len(self.bits)):
            self.bits[i] = 0
        del self.bits[:]

    def __repr__(self):
        return "Key(id=%r, bits=[secret])" % self.id


class Keys(list):
    """Keys in the order drawn or asked; leaving a with block wipes them."""

    def clear(self):
        for k in self:
            k.clear()
        super().clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.clear()


class _Unreached(Exception):
    """No connection came up, hence no request left."""


class Client:
    """A KME as one SAE sees it. Threads may share a client.

    urls: base URLs; a second one is another address of the same KME, used
    while the first cannot be reached. cert, key, ca: PEM files. timeout bounds
    one exchange, connect_timeout the way to one address, in seconds.
    """

    def __init__(self, urls, cert, key, ca, timeout=10.0, connect_timeout=3.0):
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls:
            raise ValueError("no URL is given")
        self._bases = [self._base(u) for u in urls]
        self._good = 0  # index of the address that answered last
        self._timeout, self._connect_timeout = timeout, connect_timeout
        # Not create_default_context: that one writes session keys to the file
        # SSLKEYLOGFILE and trusts the system's authorities.
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._tls.load_verify_locations(cafile=ca)
        self._tls.load_cert_chain(cert, key)
        self._idle = collections.defaultdict(list)
        self._lock = threading.Lock()

    @staticmethod
    def _base(url):
        u = urllib.parse.urlsplit(url)
        if u.scheme != "https" or not u.hostname or u.query or u.fragment or u.username:
            raise ValueError("%s is no base URL like https://host:port" % url)
        return u.hostname, u.port or 443, u.path.rstrip("/")

    def status(self, peer):
        """What this SAE and peer can draw: the Status object as a dict."""
        answer, _ = _parse(self._ask("GET", peer, "status", None))
        if "stored_key_count" not in answer:
            raise Down("answer is not valid: no stored_key_count")
        return answer

    def enc(self, peer, number=1, size=None, also=(), mandatory=None, optional=None):
        """Draw number new keys of size bits for peer and the SAEs in also."""
        body = {"number": number}
        if size is not None:
            body["size"] = size
        if also:
            body["additional_slave_SAE_IDs"] = list(also)
        if mandatory:
            body["extension_mandatory"] = mandatory
        if optional:
            body["extension_optional"] = optional
        keys = _keys(self._ask("POST", peer, "enc_keys", body))
        if len(keys) != number or len({k.id for k in keys}) != number or \
                size is not None and any(8 * len(k.bits) != size for k in keys):
            keys.clear()
            raise Down("answer is not valid: not the keys that were asked", lost=True)
        return keys

    def dec(self, peer, ids):
        """Collect the keys that peer drew for this SAE, in the order of ids."""
        ids = [i.lower() for i in ([ids] if isinstance(ids, str) else ids)]
        if not ids or not all(_ID.fullmatch(i) for i in ids) or len(set(ids)) != len(ids):
            raise BadRequest("key_IDs must be UUIDs, each once")
        body = {"key_IDs": [{"key_ID": i} for i in ids]}
        keys = _keys(self._ask("POST", peer, "dec_keys", body))
        if sorted(k.id for k in keys) != sorted(ids):
            keys.clear()
            raise Down("answer is not valid: not the keys that were asked", lost=True)
        keys.sort(key=lambda k: ids.index(k.id))
        return keys

    def close(self):
        """Close idle connections."""
        with self._lock:
            for conns in self._idle.values():
                for conn, _ in conns:
                    conn.close()
            self._idle.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _ask(self, method, peer, call, body):
        """Send to one address after the other as far as that burns no key."""
        data = None if body is None else json.dumps(body).encode()
        first, last = self._good, None
        for i in range(len(self._bases)):
            at = (first + i) % len(self._bases)
            try:
                answer = self._once(at, method, peer, call, data)
            except _Unreached as e:
                last = Denied("KME refuses us: %s" % e) if "alert" in str(e).lower() else \
                    Down("reach KME: %s" % e)
                continue
            except Error as e:
                if method == "GET" and e.lost:  # status burns nothing
                    last = e
                    continue
                raise
            self._good = at
            return answer
        raise last

    def _once(self, at, method, peer, call, data):
        host, port, prefix = self._bases[at]
        path = "%s/api/v1/keys/%s/%s" % (prefix, urllib.parse.quote(peer, safe=""), call)
        conn = self._connection(at, host, port)
        # A socket's own timeout bounds one wait; this bounds them all. It goes
        # around the TLS object, which another thread may not touch.
        sock = conn.sock
        expired = threading.Event()

        def end():
            expired.set()
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass

        watch = threading.Timer(self._timeout, end)
        watch.daemon = True
        watch.start()
        try:
            headers = {"Accept": "application/json"}
            if data is not None:
                headers["Content-Type"] = "application/json"
            conn.request(method, path, body=data, headers=headers)
            resp = conn.getresponse()
            body = _read(resp)
        except (OSError, http.client.HTTPException) as e:
            conn.close()
            if expired.is_set():
                raise Down("no answer in %g s" % self._timeout, lost=True) from None
            if isinstance(e, ssl.SSLError) and "ALERT" in (e.reason or ""):
                raise Denied("KME refuses us: %s" % e.reason.lower().replace("_", " ")) from None
            raise Down("answer was lost: %s" % (e or type(e).__name__), lost=True) from None
        finally:
            watch.cancel()
        if resp.will_close or expired.is_set():
            conn.close()
        else:
            with self._lock:
                self._idle[at].append((conn, time.monotonic()))
        if resp.status != 200:
            raise _error(resp, call, body)
        return body

    def _connection(self, at, host, port):
        """An idle connection that still lives, or a new one."""
        while True:
            with self._lock:
                if not self._idle[at]:
                    break
                conn, since = self._idle[at].pop()
            if time.monotonic() - since < IDLE and _alive(conn.sock):
                return conn
            conn.close()
        conn = http.client.HTTPSConnection(
            host, port, context=self._tls, timeout=self._connect_timeout)
        try:
            conn.connect()
        except OSError as e:
            conn.close()
            raise _Unreached(e) from None
        conn.auto_open = 0  # never connect again behind our back
        conn.sock.settimeout(self._timeout)
        return conn


def _alive(sock):
    """Whether the other end has neither closed nor sent what nobody asked."""
    timeout = sock.gettimeout()
    try:
        sock.settimeout(0)
        sock.recv(1)
        return False
    except (ssl.SSLWantReadError, BlockingIOError):
        return True
    except OSError:
        return False
    finally:
        sock.settimeout(timeout)


def _read(resp):
    """The whole body in one bytearray that its reader can wipe."""
    room = MAX_ANSWER + 1 if resp.length is None else resp.length
    if room > MAX_ANSWER + 1:
        raise http.client.HTTPException("answer of %d bytes is too long" % room)
    body, got = bytearray(room), 0
    view = memoryview(body)
    while got < room:
        n = resp.readinto(view[got:])
        if not n:
            break
        got += n
    view.release()
    # A header that was cut short looks like one without a length.
    if resp.length not in (None, 0) or got > MAX_ANSWER or resp.status == 200 and not got:
        _wipe(body)
        raise http.client.HTTPException("answer is cut short or too long")
    resp.read()  # sees the end, so that the connection can serve again
    del body[got:]
    return body


def _wipe(b):
    b[:] = bytes(len(b))


def _parse(body):
    """JSON of a body, with each key taken out first, so that no key becomes
    a str that cannot be wiped. In its place stands the key's number."""
    bits = []
    try:
        for m in list(_KEY.finditer(body)):
            start, end = m.span(1)
            bits.append(_decode(body, start, end))
            number = b"%d" % (len(bits) - 1)
            if len(number) > end - start:
                raise ValueError("too many short keys")
            body[start:end] = number.ljust(end - start)
        answer = json.loads(bytes(body))
        if not isinstance(answer, dict):
            raise ValueError("not an object")
        return answer, bits
    except ValueError as e:
        for b in bits:
            _wipe(b)
        what = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
        raise Down("answer is not valid: %s" % what, lost=True) from None
    finally:
        _wipe(body)


def _decode(body, start, end):
    text = bytearray(memoryview(body)[start:end])
    try:
        slash = text.find(b"\\/")
        while slash >= 0:
            del text[slash]
            slash = text.find(b"\\/")
        if not text or not _BASE64.fullmatch(text):
            raise ValueError("key is not padded standard base64")
        return bytearray(binascii.a2b_base64(text))
    finally:
        _wipe(text)


def _keys(body):
    answer, bits = _parse(body)
    keys = Keys()
    try:
        for item in answer["keys"]:
            if not _ID.fullmatch(item["key_ID"]):
                raise ValueError("key_ID is not a UUID")
            keys.append(Key(item["key_ID"].lower(), bits[int(item["key"])]))
        return keys
    except (KeyError, TypeError, ValueError, IndexError):
        for b in bits:
            _wipe(b)
        raise Down("answer is not valid: no container of keys", lost=True) from None


def _error(resp, call, body):
    """The exception for an answer that is not 200."""
    try:
        answer = json.loads(bytes(body))
    except ValueError:
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    message = answer.get("message")
    message = message if isinstance(message, str) else resp.reason or "no message"
    details = answer.get("details")
    details = [d for d in details if isinstance(d, dict)] if isinstance(details, list) else []
    retry = resp.headers.get("Retry-After", "")
    missing = 0
    for d in details:
        if str(d.get("missing_bits", "")).isdecimal():
            missing = int(d["missing_bits"])
    kind = Down
    if resp.status == 404 and call == "dec_keys" or \
            resp.status == 400 and message.startswith("one or more keys specified are not found"):
        kind = UnknownKey
    elif resp.status in (401, 403):
        kind = Denied
    elif resp.status < 500:
        kind = BadRequest
    elif missing or message.startswith("not enough key material"):
        kind = Empty
    e = kind(message, resp.status, details, int(retry) if retry.isdecimal() else None)
    if kind is Empty:
        e.missing_bits = missing
    return e


def _print(keys, as_json):
    """Write keys as bytes: "key_ID base64" a line, or the standard's container."""
    out = bytearray(b'{"keys":[' if as_json else b"")
    for i, k in enumerate(keys):
        text = bytearray(base64.b64encode(k.bits))
        if as_json:
            out += (b"," if i else b"") + b'{"key_ID":"%s","key":"' % k.id.encode()
            out += text
            out += b'"}'
        else:
            out += b"%s " % k.id.encode()
            out += text
            out += b"\n"
        _wipe(text)
    if as_json:
        out += b"]}\n"
    view = memoryview(out)
    while view:
        view = view[os.write(sys.stdout.fileno(), view):]
    _wipe(out)


def _arguments(args):
    p = argparse.ArgumentParser(
        prog="quietline014.py", description="Draw and collect keys over ETSI GS QKD 014.",
        epilog="Exit codes: 0 done, 1 not done, 2 not understood.")
    p.add_argument("verb", choices=["status", "enc", "dec"])
    p.add_argument("--url", action="append", required=True, help="KME; again for fail-over")
    p.add_argument("--cert", required=True, help="this SAE's certificate, PEM")
    p.add_argument("--key", required=True, help="its key, PEM")
    p.add_argument("--ca", required=True, help="the CA of the KME's certificate, PEM")
    p.add_argument("--peer", required=True, help="SAE ID of the other application")
    p.add_argument("--number", type=int, default=1, help="enc: how many keys")
    p.add_argument("--size", type=int, help="enc: bits per key")
    p.add_argument("--also", action="append", default=[], help="enc: one more SAE; repeatable")
    p.add_argument("--id", action="append", default=[], help="dec: a key_ID; repeatable")
    p.add_argument("--timeout", type=float, default=10.0, help="seconds for one exchange")
    p.add_argument("--json", action="store_true", help="print JSON")
    a = p.parse_args(args)
    if a.verb == "dec" and not a.id:
        p.error("dec needs --id")
    return a


def main(args=None):
    a = _arguments(args)
    try:
        with Client(a.url, a.cert, a.key, a.ca, timeout=a.timeout) as kme:
            if a.verb == "status":
                s = kme.status(a.peer)
                print(json.dumps(s, indent=2) if a.json else
                      "\n".join("%s: %s" % item for item in s.items()))
                return 0
            draw = kme.enc(a.peer, a.number, a.size, a.also) if a.verb == "enc" else \
                kme.dec(a.peer, a.id)
            with draw as keys:
                _print(keys, a.json)
        return 0
    except Error as e:
        print("quietline014: %s" % e, file=sys.stderr)
        if e.lost and a.verb != "status":
            print("hint: the request had left, so its keys may be gone; draw new ones",
                  file=sys.stderr)
        if e.retry_after is not None:
            print("hint: come again in %d s" % e.retry_after, file=sys.stderr)
    except (OSError, ValueError) as e:
        print("quietline014: %s" % e, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
