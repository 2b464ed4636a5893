#!/usr/bin/env node
/**
 * Draw and collect keys from a QKD key manager (KME) over ETSI GS QKD 014.
 *
 * One file, Node.js 18 or newer, nothing but the standard library.
 *
 *   import { Client } from './quietline014.mjs';
 *   const kme = new Client({ urls: ['https://kme.example:8443'],
 *                            cert: 'app.crt', key: 'app.key', ca: 'kme-ca.crt' });
 *   const keys = await kme.enc('other-app', { number: 2, size: 256 });  // draw new keys
 *   try { for (const k of keys) use(k.id, k.bits); }                    // bits is a Buffer
 *   finally { keys.clear(); }
 *   const same = await kme.dec('other-app', [id]);                      // collect by key_ID
 *
 * A caller must keep in mind: a key leaves the KME once, so a repeated enc
 * draws another key and a lost answer is a lost key. The client therefore goes
 * on to the next address only while no connection came up. Sizes are bits.
 * clear() overwrites keys with zeros; Node may keep copies in its TLS buffers.
 */

import { readFileSync, realpathSync, writeSync } from 'node:fs';
import https from 'node:https';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const MAX_ANSWER = 1 << 20; // bytes: 1,024 keys of 4,096 bits need 780 KiB
const IDLE = 90_000; // ms, less than the two minutes after which KMEs close
const ID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const INSPECT = Symbol.for('nodejs.util.inspect.custom');

/**
 * A call that brought no keys. kind: 'request' | 'unknown' | 'denied' |
 * 'empty' | 'down'. code is the HTTP status, 0 when no answer came; message
 * and details are the KME's own. lost: a request left and its answer did not
 * arrive whole, so keys it may have carried are gone.
 */
export class KMEError extends Error {
  constructor(kind, message, more = {}) {
    const { code = 0, details = [], missingBits = 0, retryAfter = null, lost = false } = more;
    super((code ? `${code}: ` : '') + message.slice(0, 300));
    this.name = 'KMEError';
    Object.assign(this, { kind, code, text: message.slice(0, 300), details, missingBits,
      retryAfter, lost });
  }
}

/** One key: id is its key_ID, bits a Buffer that clear() wipes. */
export class Key {
  constructor(id, bits) {
    this.id = id;
    Object.defineProperty(this, 'bits', { value: bits, enumerable: false });
  }
  clear() { this.bits.fill(0); }
  toString() { return `Key ${this.id} [secret]`; }
  [INSPECT]() { return this.toString(); }
}

/** Keys in the order drawn or asked. */
export class Keys extends Array {
  static get [Symbol.species]() { return Array; }
  clear() { for (const k of this) k.clear(); this.length = 0; }
}

/**
 * A KME as one SAE sees it. urls: base URLs; a second one is another address
 * of the same KME, used while the first cannot be reached. cert, key, ca: PEM
 * files. timeout bounds one exchange, connectTimeout the way to one address,
 * in milliseconds. Every call takes { signal }, an AbortSignal.
 */
export class Client {
  #bases; #agent; #timeout; #connectTimeout; #good = 0;

  constructor({ urls, cert, key, ca, timeout = 10_000, connectTimeout = 3_000 }) {
    const list = typeof urls === 'string' ? [urls] : [...urls];
    if (list.length === 0) throw new TypeError('no URL is given');
    this.#bases = list.map((s) => {
      const u = new URL(s);
      if (u.protocol !== 'https:' || u.search || u.hash || u.username) {
        throw new TypeError(`${u.origin}${u.pathname} is no base URL like https://host:port`);
      }
      return { host: u.hostname.replace(/^\[|\]$/g, ''), port: u.port || 443,
        path: u.pathname.replace(/\/+$/, '') };
    });
    this.#timeout = timeout;
    this.#connectTimeout = connectTimeout;
    this.#agent = new https.Agent({
      keepAlive: true, maxFreeSockets: 8, timeout: IDLE, maxCachedSessions: 0,
      cert: readFileSync(cert), key: readFileSync(key), ca: readFileSync(ca),
      minVersion: 'TLSv1.2', rejectUnauthorized: true,
    });
  }

  /** What this SAE and peer can draw: the Status object. */
  async status(peer, { signal } = {}) {
    const { answer } = parse(await this.#ask('GET', peer, 'status', null, signal));
    if (!Number.isInteger(answer.stored_key_count)) {
      throw new KMEError('down', 'answer is not valid: no stored_key_count');
    }
    return answer;
  }

  /** Draw number new keys of size bits for peer and the SAEs in also. */
  async enc(peer, { number = 1, size, also = [], mandatory, optional, signal } = {}) {
    const body = { number };
    if (size !== undefined) body.size = size;
    if (also.length > 0) body.additional_slave_SAE_IDs = also;
    if (mandatory) body.extension_mandatory = mandatory;
    if (optional) body.extension_optional = optional;
    const keys = container(await this.#ask('POST', peer, 'enc_keys', body, signal));
    const whole = keys.length === number && new Set(keys.map((k) => k.id)).size === number &&
      (size === undefined || keys.every((k) => 8 * k.bits.length === size));
    return whole ? keys : reject(keys);
  }

  /** Collect the keys that peer drew for this SAE, in the order of ids. */
  async dec(peer, ids, { signal } = {}) {
    const list = (typeof ids === 'string' ? [ids] : [...ids]).map((id) => id.toLowerCase());
    if (list.length === 0 || !list.every((id) => ID.test(id)) ||
        new Set(list).size !== list.length) {
      throw new KMEError('request', 'key_IDs must be UUIDs, each once');
    }
    const body = { key_IDs: list.map((id) => ({ key_ID: id })) };
    const keys = container(await this.#ask('POST', peer, 'dec_keys', body, signal));
    const got = keys.map((k) => k.id).sort();
    if (got.join() !== [...list].sort().join()) return reject(keys);
    keys.sort((a, b) => list.indexOf(a.id) - list.indexOf(b.id));
    return keys;
  }

  /** Close idle connections. */
  close() { this.#agent.destroy(); }

  /** Ask one address after the other as far as that burns no key. */
  async #ask(method, peer, call, body, signal) {
    const data = body === null ? null : Buffer.from(JSON.stringify(body));
    const first = this.#good;
    let last;
    for (let i = 0; i < this.#bases.length; i++) {
      const at = (first + i) % this.#bases.length;
      try {
        const answer = await this.#once(this.#bases[at], method, peer, call, data, signal);
        this.#good = at;
        return answer;
      } catch (err) {
        const again = err.unreached || (method === 'GET' && err.lost); // status burns nothing
        if (!again || signal?.aborted) throw err;
        last = err;
      }
    }
    throw last;
  }

  async #once(base, method, peer, call, data, signal) {
    signal?.throwIfAborted();
    // Let the loop see closes of idle connections, so that none of them is used.
    await new Promise((done) => { setImmediate(done); });
    const path = `${base.path}/api/v1/keys/${encodeURIComponent(peer)}/${call}`;
    const headers = { Accept: 'application/json' };
    if (data) Object.assign(headers, { 'Content-Type': 'application/json',
      'Content-Length': data.length });
    return new Promise((resolve, fail) => {
      let up = false; // a connection came up, so the request may have left
      const timers = [];
      const req = https.request({ host: base.host, port: base.port, path, method, headers,
        agent: this.#agent });
      const end = (err) => { req.destroy(err); };
      const abort = () => end(new Error('aborted by the caller'));
      const after = (ms, text) => {
        timers.push(setTimeout(() => end(new Error(text)), ms));
        return timers.at(-1);
      };
      const finish = (act, value) => {
        timers.forEach(clearTimeout);
        signal?.removeEventListener('abort', abort);
        act(value);
      };
      signal?.addEventListener('abort', abort, { once: true });
      after(this.#timeout, `no answer in ${this.#timeout} ms`);
      req.on('socket', (socket) => {
        if (req.reusedSocket) { up = true; return; }
        const dial = after(this.#connectTimeout,
          `no connection in ${this.#connectTimeout} ms`);
        socket.once('secureConnect', () => { up = true; clearTimeout(dial); });
      });
      req.on('error', (err) => finish(fail, transportError(err, up)));
      req.on('response', (resp) => {
        read(resp).then(
          (body) => {
            if (resp.statusCode === 200) finish(resolve, body);
            else finish(fail, answerError(resp, call, body));
          },
          (err) => { req.destroy(); finish(fail, transportError(err, true)); });
      });
      req.end(data ?? undefined);
    });
  }
}

/** A refusal by alert is the other end's word on our certificate. */
function transportError(err, up) {
  const what = err.message || err.code || 'connection failed';
  const alert = /alert/i.test(`${err.code} ${what}`);
  const e = alert
    ? new KMEError('denied', `KME refuses us: ${err.reason ?? what}`)
    : new KMEError('down', `${up ? 'answer was lost' : 'reach KME'}: ${what}`, { lost: up });
  e.unreached = !up;
  return e;
}

/** The whole body in one Buffer that its reader can wipe. */
async function read(resp) {
  const chunks = [];
  let size = 0;
  try {
    for await (const chunk of resp) {
      chunks.push(chunk);
      size += chunk.length;
      if (size > MAX_ANSWER) throw new Error(`answer is longer than ${MAX_ANSWER} bytes`);
    }
    if (!resp.complete) throw new Error('answer is cut short');
    return Buffer.concat(chunks);
  } finally {
    for (const chunk of chunks) chunk.fill(0);
  }
}

function reject(keys) {
  keys.clear();
  throw new KMEError('down', 'answer is not valid: not the keys that were asked',
    { lost: true });
}

const QUOTE = 0x22, BACKSLASH = 0x5c, SLASH = 0x2f;
const DIGITS = new Int8Array(256).fill(-1);
[...'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'].forEach(
  (c, i) => { DIGITS[c.charCodeAt(0)] = i; });

/** Where the text of the next member "key" stands in body, from position i. */
function nextKey(body, from) {
  const blank = (i) => { while ([0x20, 0x09, 0x0a, 0x0d].includes(body[i])) i++; return i; };
  for (let i = body.indexOf('"key"', from); i >= 0; i = body.indexOf('"key"', i + 5)) {
    let start = blank(i + 5);
    if (body[start] !== 0x3a) continue; // a colon
    start = blank(start + 1);
    if (body[start] !== QUOTE) continue;
    const end = body.indexOf(QUOTE, ++start);
    if (end >= 0) return { start, end };
  }
  return null;
}

/** Padded standard base64 (RFC 4648 section 4), where JSON may escape a slash. */
function decode(text) {
  const digits = Buffer.alloc(text.length);
  let n = 0, pad = 0;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === BACKSLASH && text[i + 1] === SLASH) continue;
    if (text[i] === 0x3d) pad++;
    else if (pad > 0 || DIGITS[text[i]] < 0) n = NaN;
    else digits[n++] = DIGITS[text[i]];
  }
  if (!(n > 0) || pad > 2 || (n + pad) % 4 !== 0) {
    digits.fill(0);
    throw new SyntaxError('key is not padded standard base64');
  }
  const bits = Buffer.alloc(Math.floor((n * 3) / 4));
  for (let i = 0, bit = 0; i < bits.length; i++, bit += 8) {
    const at = Math.floor(bit / 6), shift = bit % 6;
    bits[i] = (digits[at] << (2 + shift)) | (digits[at + 1] >> (4 - shift)); // low 8 bits
  }
  digits.fill(0);
  return bits;
}

/**
 * JSON of a body, with each key taken out first, so that no key becomes a
 * string that cannot be wiped. In its place stands the key's number.
 */
function parse(body) {
  const bits = [];
  try {
    for (let k = nextKey(body, 0); k; k = nextKey(body, k.end + 1)) {
      const text = body.subarray(k.start, k.end);
      bits.push(decode(text));
      const number = String(bits.length - 1);
      if (number.length > text.length) throw new SyntaxError('too many short keys');
      text.fill(0x20).write(number, 'latin1');
    }
    const answer = JSON.parse(body.toString('utf8'));
    if (answer === null || typeof answer !== 'object') throw new SyntaxError('not an object');
    return { answer, bits };
  } catch (err) {
    for (const b of bits) b.fill(0);
    throw new KMEError('down', `answer is not valid: ${err.message}`, { lost: true });
  } finally {
    body.fill(0);
  }
}

function container(body) {
  const { answer, bits } = parse(body);
  const keys = new Keys();
  const good = Array.isArray(answer.keys) && answer.keys.every((item) => {
    const at = typeof item?.key === 'string' ? Number.parseInt(item.key, 10) : NaN;
    if (!bits[at] || typeof item.key_ID !== 'string' || !ID.test(item.key_ID)) return false;
    keys.push(new Key(item.key_ID.toLowerCase(), bits[at]));
    return true;
  });
  if (good) return keys;
  for (const b of bits) b.fill(0);
  throw new KMEError('down', 'answer is not valid: no container of keys', { lost: true });
}

/** The error for an answer that is not 200. */
function answerError(resp, call, body) {
  let answer = null;
  try { answer = JSON.parse(body.toString('utf8')); } catch { /* a proxy's page, perhaps */ }
  const text = typeof answer?.message === 'string' ? answer.message : resp.statusMessage;
  const details = Array.isArray(answer?.details)
    ? answer.details.filter((d) => d && typeof d === 'object') : [];
  const missingBits = Number(details.find((d) => /^\d+$/.test(d.missing_bits))?.missing_bits ?? 0);
  const retry = resp.headers['retry-after'] ?? '';
  const code = resp.statusCode;
  let kind = 'down';
  if ((code === 404 && call === 'dec_keys') ||
      (code === 400 && text.startsWith('one or more keys specified are not found'))) {
    kind = 'unknown';
  } else if (code === 401 || code === 403) kind = 'denied';
  else if (code < 500) kind = 'request';
  else if (missingBits > 0 || text.startsWith('not enough key material')) kind = 'empty';
  return new KMEError(kind, text || 'no message', { code, details, missingBits,
    retryAfter: /^\d+$/.test(retry) ? Number(retry) : null });
}

const USAGE = `usage: quietline014.mjs status|enc|dec
  --url URL --cert FILE --key FILE --ca FILE --peer SAE
  enc: --number N --size BITS --also SAE (repeatable)    dec: --id KEY_ID (repeatable)
  --url again for fail-over, --timeout SECONDS, --json
Exit codes: 0 done, 1 not done, 2 not understood.`;

function commandLine(args) {
  const text = { type: 'string' }, list = { type: 'string', multiple: true };
  const { values: v, positionals } = parseArgs({ args, allowPositionals: true, options: {
    url: list, cert: text, key: text, ca: text, peer: text, number: text, size: text,
    also: list, id: list, timeout: text, json: { type: 'boolean' }, help: { type: 'boolean' },
  } });
  if (v.help) return { verb: 'help' };
  const [verb, ...rest] = positionals;
  if (!['status', 'enc', 'dec'].includes(verb) || rest.length > 0) {
    throw new TypeError('expected one verb: status, enc or dec');
  }
  for (const name of ['url', 'cert', 'key', 'ca', 'peer', ...(verb === 'dec' ? ['id'] : [])]) {
    if (!v[name]) throw new TypeError(`--${name} is missing`);
  }
  for (const name of ['number', 'size', 'timeout']) {
    if (v[name] !== undefined && !(Number(v[name]) >= 0)) {
      throw new TypeError(`--${name} is no number`);
    }
  }
  return { verb, ...v };
}

/** "key_ID base64" a line, or the standard's container; as bytes, then wiped. */
function print(keys, asJSON) {
  const parts = asJSON ? [Buffer.from('{"keys":[')] : [];
  keys.forEach((k, i) => {
    const text = Buffer.from(k.bits.toString('base64'));
    parts.push(Buffer.from(asJSON ? `${i ? ',' : ''}{"key_ID":"${k.id}","key":"` : `${k.id} `),
      text, Buffer.from(asJSON ? '"}' : '\n'));
  });
  if (asJSON) parts.push(Buffer.from(']}\n'));
  const out = Buffer.concat(parts);
  for (let at = 0; at < out.length;) {
    try {
      at += writeSync(1, out, at);
    } catch (err) {
      if (err.code !== 'EAGAIN') throw err; // a slow pipe
    }
  }
  for (const b of [...parts, out]) b.fill(0);
}

async function main(args) {
  let a;
  try {
    a = commandLine(args);
  } catch (err) {
    console.error(`quietline014: ${err.message}\n${USAGE}`);
    return 2;
  }
  if (a.verb === 'help') { console.log(USAGE); return 0; }
  let kme;
  try {
    kme = new Client({ urls: a.url, cert: a.cert, key: a.key, ca: a.ca,
      timeout: 1000 * Number(a.timeout ?? 10) });
    if (a.verb === 'status') {
      const s = await kme.status(a.peer);
      console.log(a.json ? JSON.stringify(s, null, 2)
        : Object.entries(s).map(([k, v]) => `${k}: ${v}`).join('\n'));
      return 0;
    }
    const keys = a.verb === 'dec' ? await kme.dec(a.peer, a.id)
      : await kme.enc(a.peer, { number: Number(a.number ?? 1), also: a.also,
        size: a.size === undefined ? undefined : Number(a.size) });
    print(keys, a.json);
    keys.clear();
    return 0;
  } catch (err) {
    console.error(`quietline014: ${err.message}`);
    if (err.lost && a.verb !== 'status') {
      console.error('hint: the request had left, so its keys may be gone; draw new ones');
    }
    if (err.retryAfter != null) console.error(`hint: come again in ${err.retryAfter} s`);
    return 1;
  } finally {
    kme?.close();
  }
}

/** Whether this file is the program; a path may lead here by a symbolic link. */
function isProgram(path) {
  try {
    return realpathSync(path) === fileURLToPath(import.meta.url);
  } catch {
    return false; // no path, or "-" for a program on standard input
  }
}

if (isProgram(process.argv[1])) process.exitCode = await main(process.argv.slice(2));
