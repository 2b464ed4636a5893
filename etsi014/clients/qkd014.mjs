#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/**
 * Draw QKD keys from a key manager (KME) by ETSI GS QKD 014 V1.1.1.
 *
 *   import { Client } from './qkd014.mjs';
 *   const kme = new Client(['https://kme.example:8443'],
 *     { cert: 'sae.crt', key: 'sae.key', ca: 'ca.crt' });
 *   for (const k of await kme.encKeys('peer-SAE', { number: 2, size: 256 })) {
 *     use(k.id, k.bits);        // tell the peer k.id; k.bits is a Buffer
 *     k.clear();
 *   }
 *   const keys = await otherKme.decKeys('my-SAE', [id1, id2]);   // at the peer
 *
 * From the shell:
 *
 *   node qkd014.mjs --url https://kme:8443 --cert sae.crt --key sae.key --ca ca.crt \
 *     status PEER | enc PEER [--number N] [--size BITS] | dec MASTER KEY_ID...
 *
 * Sizes are bits. A key is delivered once: encKeys again draws other keys, and
 * a lost answer is a lost key, so nothing is asked again by itself. A second
 * URL is tried only if the first could not be connected to. JavaScript cannot
 * wipe the text of an answer; what it could not wipe is freed some day.
 */
import { readFileSync, realpathSync } from 'node:fs';
import http from 'node:http';
import tls from 'node:tls';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

/** An answer other than 200, or none at all (status 0). */
export class QKDError extends Error {
  constructor(status, message, details = [], retryAfter = null) {
    super(status ? `KME answers ${status}: ${message}` : message);
    this.status = status; // 400, 401, 503 ...
    this.details = details;
    this.retryAfter = retryAfter; // seconds, or null
  }
}

/** One key: id is its key_ID, bits a Buffer that clear() wipes. */
export class Key {
  #bits;
  constructor(id, bits) {
    this.id = id;
    this.#bits = bits; // private, so that no inspector or JSON shows it
  }
  get bits() { return this.#bits; }
  clear() { this.#bits.fill(0); }
}

/** A client of one KME. Calls may run at the same time. */
export class Client {
  #bases; #tls; #timeout; #at = 0;

  constructor(urls, { cert, key, ca, timeout = 10000 }) {
    this.#bases = urls.map((text) => {
      const u = new URL(text);
      if (u.protocol !== 'https:' || u.search || u.hash) {
        throw new TypeError(`${text} is no base URL like https://host:port`);
      }
      return u;
    });
    if (this.#bases.length === 0) throw new TypeError('a URL is required');
    this.#tls = {
      cert: readFileSync(cert), key: readFileSync(key), ca: readFileSync(ca),
      minVersion: 'TLSv1.2', ALPNProtocols: ['http/1.1'],
    };
    this.#timeout = timeout;
  }

  /** What this SAE and peer can draw, as the standard's object (table 8). */
  status(peer) { return this.#ask('GET', peer, 'status'); }

  /** Draw new keys for this SAE and peer. */
  async encKeys(peer, { number = 1, size, additional, mandatory, optional } = {}) {
    const keys = toKeys(await this.#ask('POST', peer, 'enc_keys', {
      number, size, additional_slave_SAE_IDs: additional,
      extension_mandatory: mandatory, extension_optional: optional,
    }));
    if (keys.length !== number || keys.some((k) => size && 8 * k.bits.length !== size)) {
      throw new QKDError(0, 'the KME gave other keys than were asked');
    }
    return keys;
  }

  /** Fetch the keys that master drew for this SAE, in the order of ids. */
  async decKeys(master, ids) {
    const names = ids.map((id) => id.toLowerCase());
    const keys = new Map(toKeys(await this.#ask('POST', master, 'dec_keys', {
      key_IDs: names.map((id) => ({ key_ID: id })),
    })).map((k) => [k.id.toLowerCase(), k]));
    if (keys.size !== names.length || names.some((id) => !keys.has(id))) {
      throw new QKDError(0, 'the KME gave other keys than were asked');
    }
    return names.map((id) => keys.get(id));
  }

  /** A connection that is up: only before that may another URL be tried. */
  async #connect() {
    let fault;
    for (let i = 0; i < this.#bases.length; i++) {
      const at = (this.#at + i) % this.#bases.length;
      const base = this.#bases[at];
      const host = base.hostname.replace(/^\[|\]$/g, '');
      try {
        const socket = await new Promise((resolve, reject) => {
          const s = tls.connect({
            ...this.#tls, host, port: Number(base.port || 443), timeout: this.#timeout,
            servername: /^[\d.]+$|:/.test(host) ? '' : host,
          });
          s.once('secureConnect', () => resolve(s));
          s.once('timeout', () => s.destroy(new Error('timeout')));
          s.once('error', reject);
        });
        this.#at = at;
        return { socket, base };
      } catch (e) {
        fault = e;
      }
    }
    throw new QKDError(0, `reach KME: ${fault.message}`);
  }

  async #ask(method, sae, call, body) {
    const { socket, base } = await this.#connect();
    const id = encodeURIComponent(sae);
    const path = `${base.pathname.replace(/\/$/, '')}/api/v1/keys/${id}/${call}`;
    const text = body === undefined ? '' : JSON.stringify(body);
    const headers = { Accept: 'application/json', Host: base.host };
    if (text) {
      headers['Content-Type'] = 'application/json';
      headers['Content-Length'] = Buffer.byteLength(text);
    }
    const answer = await new Promise((resolve, reject) => {
      const lost = (e) => reject(new QKDError(0, `answer was lost: ${e.message}`));
      // No agent: it would connect, hence perhaps ask, by itself.
      const req = http.request({
        method, path, headers, createConnection: () => socket, timeout: this.#timeout,
      }, (res) => {
        const parts = [];
        res.on('data', (b) => parts.push(b));
        res.on('error', lost);
        res.on('end', () => resolve({ res, body: Buffer.concat(parts) }));
      });
      req.on('error', lost);
      req.on('timeout', () => req.destroy(new Error('timeout')));
      req.end(text);
    });
    socket.destroy();
    return read(answer);
  }
}

function read({ res, body }) {
  let value;
  try {
    value = JSON.parse(body.toString('utf8'));
  } catch {
    value = undefined;
  }
  body.fill(0);
  if (res.statusCode !== 200) {
    const after = /^\d+$/.test(res.headers['retry-after'] ?? '');
    throw new QKDError(res.statusCode, value?.message ?? res.statusMessage, value?.details,
      after ? Number(res.headers['retry-after']) : null);
  }
  if (typeof value !== 'object' || value === null) {
    throw new QKDError(0, 'the answer is no JSON object');
  }
  return value;
}

function toKeys(container) {
  if (!Array.isArray(container.keys)) throw new QKDError(0, 'the answer is no key container');
  return container.keys.map((k) => {
    const bits = Buffer.from(String(k?.key), 'base64');
    if (typeof k?.key_ID !== 'string' || bits.toString('base64') !== k.key) {
      throw new QKDError(0, 'the answer is no key container');
    }
    return new Key(k.key_ID, bits);
  });
}

async function main() {
  const { values: v, positionals: [call, peer, ...ids] } = parseArgs({
    allowPositionals: true,
    options: {
      url: { type: 'string', multiple: true }, cert: { type: 'string' }, key: { type: 'string' },
      ca: { type: 'string' }, number: { type: 'string', default: '1' }, size: { type: 'string' },
    },
  });
  if (!v.url || !v.cert || !v.key || !v.ca || !peer || !['status', 'enc', 'dec'].includes(call)) {
    throw new TypeError('usage: --url URL --cert FILE --key FILE --ca FILE status|enc|dec SAE ...');
  }
  const kme = new Client(v.url, v);
  if (call === 'status') {
    console.log(JSON.stringify(await kme.status(peer)));
    return;
  }
  const keys = call === 'dec' ? await kme.decKeys(peer, ids) : await kme.encKeys(peer, {
    number: Number(v.number), size: v.size === undefined ? undefined : Number(v.size),
  });
  for (const k of keys) {
    console.log(k.id, k.bits.toString('base64'));
    k.clear();
  }
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main().catch((e) => {
    console.error(`qkd014: ${e.message}`);
    process.exit(1);
  });
}
