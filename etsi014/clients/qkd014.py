#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw QKD keys from a key manager (KME) by ETSI GS QKD 014 V1.1.1.

    from qkd014 import Client
    kme = Client(["https://kme.example:8443"], cert="sae.crt", key="sae.key", ca="ca.crt")
    for k in kme.enc_keys("peer-SAE", number=2, size=256):
        use(k.id, k.bits)       # tell the peer k.id; k.bits is a bytearray
        k.clear()
    keys = other_kme.dec_keys("my-SAE", [id1, id2])   # at the peer

From the shell:

    python3 qkd014.py --url https://kme:8443 --cert sae.crt --key sae.key --ca ca.crt \\
        status PEER | enc PEER [--number N] [--size BITS] | dec MASTER KEY_ID...

Sizes are bits. A key is delivered once: enc_keys again draws other keys, and a
lost answer is a lost key, so nothing is asked again by itself. A second URL is
tried only if the first could not be connected to. Python cannot wipe the text
of an answer; what it could not wipe is freed soon.
"""
import argparse
import base64
import http.client
import json
import ssl
import sys
import time
import urllib.parse

# A kept connection older than this is not used again: the KME may have closed
# it, and a request on it would be lost together with its keys.
IDLE_SECONDS = 60


class QKDError(Exception):
    """An answer other than 200, or none at all (status 0)."""

    def __init__(self, status, message, details=None, retry_after=None):
        super().__init__("KME answers %d: %s" % (status, message) if status else message)
        self.status = status  # 400, 401, 503 ...
        self.message = message
        self.details = details or []
        self.retry_after = retry_after  # seconds, or None


class Key:
    """One key: id is its key_ID, bits a bytearray that clear() wipes."""

    def __init__(self, id, bits):
        self.id = id
        self.bits = bits

    def clear(self):
        for i in range(len(self.bits)):
            self.bits[i] = 0

    def __repr__(self):
        return "Key(%s, [secret])" % self.id


class Client:
    """A client of one KME. Not safe for use by several threads at once."""

    def __init__(self, urls, cert, key, ca, timeout=10.0):
        self._bases = [self._base(u) for u in urls]
        if not self._bases:
            raise ValueError("a URL is required")
        self._tls = ssl.create_default_context(cafile=ca)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._tls.load_cert_chain(cert, key)
        self._timeout = timeout
        self._conn = None
        self._at = 0
        self._used = 0.0

    @staticmethod
    def _base(url):
        u = urllib.parse.urlsplit(url)
        if u.scheme != "https" or not u.hostname or u.query or u.fragment:
            raise ValueError("%s is no base URL like https://host:port" % url)
        return u.hostname, u.port or 443, u.path.rstrip("/")

    def close(self):
        if self._conn:
            self._conn.close()
            self._conn = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def status(self, peer):
        """What this SAE and peer can draw, as the standard's object (table 8)."""
        return self._ask("GET", peer, "status", None)

    def enc_keys(self, peer, number=1, size=None, additional=(), mandatory=(), optional=()):
        """Draw new keys for this SAE and peer."""
        body = {"number": number}
        if size is not None:
            body["size"] = size
        if additional:
            body["additional_slave_SAE_IDs"] = list(additional)
        if mandatory:
            body["extension_mandatory"] = list(mandatory)
        if optional:
            body["extension_optional"] = list(optional)
        keys = self._keys(self._ask("POST", peer, "enc_keys", body))
        if len(keys) != number or any(size and 8 * len(k.bits) != size for k in keys):
            raise QKDError(0, "the KME gave other keys than were asked")
        return keys

    def dec_keys(self, master, ids):
        """Fetch the keys that master drew for this SAE, in the order of ids."""
        ids = [i.lower() for i in ids]
        body = {"key_IDs": [{"key_ID": i} for i in ids]}
        keys = {k.id.lower(): k for k in self._keys(self._ask("POST", master, "dec_keys", body))}
        if sorted(keys) != sorted(ids):
            raise QKDError(0, "the KME gave other keys than were asked")
        return [keys[i] for i in ids]

    @staticmethod
    def _keys(container):
        try:
            return [Key(k["key_ID"], bytearray(base64.b64decode(k["key"], validate=True)))
                    for k in container["keys"]]
        except (KeyError, TypeError, ValueError):
            raise QKDError(0, "the answer is no key container") from None

    def _connect(self):
        """A connection that is up: only before that may another URL be tried."""
        if self._conn and time.monotonic() - self._used < IDLE_SECONDS:
            return self._conn
        self.close()
        fault = None
        for i in range(len(self._bases)):
            at = (self._at + i) % len(self._bases)
            host, port, _ = self._bases[at]
            conn = http.client.HTTPSConnection(host, port, timeout=self._timeout,
                                               context=self._tls)
            try:
                conn.connect()
            except OSError as e:
                fault = e
                continue
            conn.auto_open = 0  # never connect, hence never ask, by itself
            self._conn, self._at = conn, at
            return conn
        raise QKDError(0, "reach KME: %s" % fault)

    def _ask(self, method, sae, call, body):
        conn = self._connect()
        path = "%s/api/v1/keys/%s/%s" % (
            self._bases[self._at][2], urllib.parse.quote(sae, safe=""), call)
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            data = json.dumps(body)
            headers["Content-Type"] = "application/json"
        try:
            conn.request(method, path, data, headers)
            answer = conn.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as e:
            self.close()
            raise QKDError(0, "answer was lost: %s" % e) from None
        self._used = time.monotonic()
        if answer.will_close:
            self.close()
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if answer.status != 200:
            self._refuse(answer, value if isinstance(value, dict) else {})
        if not isinstance(value, dict):
            raise QKDError(0, "the answer is no JSON object")
        return value

    @staticmethod
    def _refuse(answer, error):
        after = answer.getheader("Retry-After", "")
        raise QKDError(answer.status, str(error.get("message", answer.reason)),
                       error.get("details"), int(after) if after.isdigit() else None)


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw QKD keys by ETSI GS QKD 014.")
    p.add_argument("--url", action="append", required=True, help="base URL; may stand twice")
    for name in ("cert", "key", "ca"):
        p.add_argument("--" + name, required=True, help="PEM file")
    calls = p.add_subparsers(dest="call", required=True)
    c = calls.add_parser("status")
    c.add_argument("peer")
    c = calls.add_parser("enc")
    c.add_argument("peer")
    c.add_argument("--number", type=int, default=1)
    c.add_argument("--size", type=int, help="bits")
    c = calls.add_parser("dec")
    c.add_argument("master")
    c.add_argument("id", nargs="+")
    a = p.parse_args(argv)
    try:
        with Client(a.url, a.cert, a.key, a.ca) as kme:
            if a.call == "status":
                print(json.dumps(kme.status(a.peer)))
                return 0
            if a.call == "enc":
                keys = kme.enc_keys(a.peer, a.number, a.size)
            else:
                keys = kme.dec_keys(a.master, a.id)
            for k in keys:
                print(k.id, base64.b64encode(k.bits).decode())
                k.clear()
    except (QKDError, OSError, ValueError) as e:
        print("qkd014: %s" % e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
