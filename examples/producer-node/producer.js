// Mints task tokens for a safedefer handler. The format is described in schema/README.md.

import { randomUUID } from "node:crypto";
import { CompactSign } from "jose";

const DAY = 86_400;

/**
 * Returns a signed task token: what is POSTed as application/jose.
 *
 * @param {{kid: string, k: string}} key  the key's name and its secret in base64url
 * @param {string} callable  "module:qualname" of a function
 * @param {unknown[]} args  typed values (schema/README.md): JSON, or objects with one tag such as {"$bytes": "YQ=="}
 * @param {Record<string, unknown>} kwargs  typed values by name
 * @param {{environment?: string, queue?: string, target?: string, url?: string, delay?: number, now?: number,
 *   retry?: Record<string, number>, deadline?: number}} options  `retry` and `deadline` are the claims of these names
 */
export async function mint(key, callable, args = [], kwargs = {}, options = {}) {
  const { environment = "default", queue = "default", target = "default", url = "/_ah/queue/deferred" } = options;
  const now = options.now ?? Math.floor(Date.now() / 1000);
  const due = now + Math.floor(options.delay ?? 0);
  const [module, qualname] = callable.split(":");
  const claims = {
    v: 1,
    jti: randomUUID().replaceAll("-", ""),
    iat: now,
    nbf: due,
    exp: due + 31 * DAY,
    aud: `${environment}:${queue}:${target}:${url}`,
    cty: "typed",
    call: { kind: "function", module, qualname },
    args,
    kwargs,
    // An absent claim is left out: JSON.stringify drops what is undefined.
    retry: options.retry,
    deadline: options.deadline,
  };
  return new CompactSign(new TextEncoder().encode(JSON.stringify(claims)))
    .setProtectedHeader({ alg: "HS256", typ: "safedefer+jwt", kid: key.kid })
    .sign(Buffer.from(key.k, "base64url"));
}

/** The tagged spelling of what JSON has no word for; plain JSON stays as it is. */
export function typed(value) {
  if (typeof value === "bigint") {
    return Number.isSafeInteger(Number(value)) ? Number(value) : { $int: value.toString() };
  }
  if (typeof value === "number" && !Number.isFinite(value)) {
    return { $float: Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf" };
  }
  if (value instanceof Uint8Array) {
    return { $bytes: Buffer.from(value).toString("base64") };
  }
  if (value instanceof Date) {
    // Python writes six digits of a second, or none.
    const text = value.toISOString().slice(0, -1);
    return { $datetime: [text.endsWith(".000") ? text.slice(0, -4) : `${text}000`, 0, { $zoneinfo: "UTC" }] };
  }
  if (value instanceof Set) {
    return { $set: [...value].map(typed) };
  }
  if (value instanceof Map) {
    return { $dict: [...value].map(([name, item]) => [typed(name), typed(item)]) };
  }
  if (Array.isArray(value)) {
    return value.map(typed);
  }
  if (value !== null && typeof value === "object") {
    const entries = Object.entries(value).map(([name, item]) => [name, typed(item)]);
    // A dict of the user's that looks like a tag is never written as one.
    return entries.some(([name]) => name.startsWith("$")) ? { $dict: entries } : Object.fromEntries(entries);
  }
  return value;
}
