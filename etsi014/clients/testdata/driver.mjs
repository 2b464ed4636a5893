// Uses quietline014.mjs as a module, step by step for TestAsModule.
import { once } from 'node:events';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { inspect } from 'node:util';

const setup = JSON.parse(process.argv[2]);
const { Client } = await import(pathToFileURL(resolve(setup.module)));
const client = ([, cert, , key, , ca]) => new Client({ urls: [setup.url], cert, key, ca });
const say = (text) => process.stdout.write(`${text}\n`);
const must = (good, what) => { if (!good) throw new Error(what); };

const tokyo = client(setup.tokyo), kochi = client(setup.kochi);
for (let i = 0; i < 3; i++) await tokyo.status(setup.kochiID);
const keys = await tokyo.enc(setup.kochiID);
const same = await kochi.dec(setup.tokyoID, [keys[0].id]);
must(keys[0].bits.equals(same[0].bits), 'the keys differ');
await kochi.dec(setup.tokyoID, keys[0].id).then(
  () => must(false, 'collected twice'),
  (err) => must(err.kind === 'unknown' && err.code === 400 && !err.lost, `${err}`));
say(keys[0].bits.toString('hex'));
const line = (v) => inspect(v, { depth: 9, showHidden: false }).replaceAll('\n', ' ');
say([line(keys), JSON.stringify(keys), String(keys[0]), line(keys[0]), line(tokyo)].join(' '));
const held = keys[0].bits;
keys.clear();
say(held.every((b) => b === 0) && keys.length === 0 ? 'wiped' : 'still there');
await once(process.stdin, 'data');
process.stdin.destroy();
say((await tokyo.enc(setup.kochiID)).length === 1 ? 'drawn' : 'nothing');

const aborted = AbortSignal.abort();
await tokyo.enc(setup.kochiID, { signal: aborted }).then(
  () => must(false, 'drawn although aborted'), (err) => must(err.name === 'AbortError', `${err}`));
const ids = new Set();
await Promise.all([1, 2, 3, 4, 5].map(async () => {
  for (const k of await tokyo.enc(setup.kochiID, { number: 4 })) ids.add(k.id);
}));
say(`many threads: ${ids.size} keys, all different`);
tokyo.close();
kochi.close();
