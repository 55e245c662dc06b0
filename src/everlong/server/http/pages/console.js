// The console. Whatever comes from the service is put in as text, never as markup.

const KEY = "everlong-key";
const GAP_S = 30 * 60; // a pause in the history that is worth a line
const POLL_MS = 10_000;
const CHOICES = 8;
const KEPT_CALLS = 200;

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");

/** An element with a class, text and children. */
function make(tag, name = "", ...content) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...content.map((part) => (part instanceof Node ? part : String(part))));
  return made;
}

// --- calls

/** A call that failed: what was asked, and what the service said, word for word. */
class Refused extends Error {
  constructor(call, status, detail) {
    super(detail);
    Object.assign(this, { call, status });
  }
}

/** JSON with integers beyond 2^53 as BigInt, where the browser tells how they were written. */
function parse(text) {
  return JSON.parse(text, (_, value, context) =>
    Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source)
      ? BigInt(context.source)
      : value,
  );
}

function write(value) {
  return JSON.stringify(value, (_, part) => {
    if (typeof part !== "bigint") return part;
    // a rounded id would be that of another user
    if (!JSON.rawJSON) throw new Error(`this browser cannot send ${part} exactly; take a newer one`);
    return JSON.rawJSON(String(part));
  });
}

const times = new Map(); // call -> its last times, ms

/** Asks a route; `call` is its name in the table of calls. */
async function ask(call, path, body) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const written = body && write(body);
  const began = performance.now();
  let answer, text;
  try {
    const method = call.split(" ")[0];
    answer = await fetch(path, { method, headers, body: written, cache: "no-store" });
    text = await answer.text();
  } catch (error) {
    throw new Refused(call, 0, `no answer: ${error.message}`);
  }
  noteTime(call, performance.now() - began);
  let told;
  try {
    told = parse(text);
  } catch {
    told = { detail: text };
  }
  if (answer.ok) return told;
  if (answer.status === 401) $("key-box").open = true;
  const detail = told?.detail ?? told;
  throw new Refused(call, answer.status, typeof detail === "string" ? detail : write(detail));
}

function noteTime(call, ms) {
  const kept = [...(times.get(call) ?? []), ms].slice(-KEPT_CALLS);
  times.set(call, kept);
  const rows = [...times].map(([name, values]) => {
    const sorted = [...values].sort((a, b) => a - b);
    const cells = [values.at(-1), sorted[sorted.length >> 1], sorted.at(-1)];
    const head = make("th", "", name.replace("/v1/", ""));
    head.scope = "row";
    return make("tr", "", head, ...cells.map((value) => make("td", "", value.toFixed(1))));
  });
  $("calls").replaceChildren(...rows);
}

// --- ids: JSON tells 7 from "7", and the service takes the one that its log has

const numeric = { user_id: undefined, item_id: undefined };

function typed(name, text) {
  const whole = /^-?\d+$/.test(text);
  if (!whole || numeric[name] === false) return text;
  return Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text);
}

function learn(name, id) {
  numeric[name] = typeof id !== "string";
}

/** Asks again where the service says that its ids are of the other type. */
async function askTyped(asking) {
  try {
    return await asking();
  } catch (error) {
    const told = /^(user_id|item_id): expected (int|str)\b/.exec(error.message);
    if (!told || numeric[told[1]] === (told[2] === "int")) throw error;
    numeric[told[1]] = told[2] === "int";
    return askTyped(asking);
  }
}

// --- what is shown

let shown = null; // { text, k, seen, user, list } of the last answer
let turn = 0; // answers to earlier questions are dropped

function say(text) {
  $("said").textContent = text;
}

function tellError(error) {
  if (!(error instanceof Refused)) console.error(error);
  const status = error.status ? `${error.status} · ` : "";
  const head = error instanceof Refused ? `${status}${error.call}` : "This page";
  $("error").replaceChildren(make("strong", "", head), make("p", "", error.message));
}

/** Runs what a form or a control asks for; whatever goes wrong is shown. */
async function attempt(work) {
  $("error").replaceChildren();
  $("board").setAttribute("aria-busy", "true");
  try {
    await work();
  } catch (error) {
    tellError(error);
  }
  $("board").removeAttribute("aria-busy");
}

/** Reads user and list, and shows them; `after` is the receipt of an event just sent. */
async function showUser(text, after = null) {
  const mine = ++turn;
  const k = $("k").valueAsNumber;
  const seen = $("seen").checked;
  const user = await ask("GET /v1/users", `v1/users/${encodeURIComponent(text)}`).catch((error) => {
    if (error.status === 404) return null;
    throw error;
  });
  if (user) learn("user_id", user.user_id);
  const list = await askTyped(() =>
    ask("POST /v1/recommend", "v1/recommend", {
      user_id: typed("user_id", text),
      k,
      filter_seen: seen,
      min_offset: after?.offset ?? 0,
    }),
  );
  if (mine !== turn) return;
  if (list.items.length) learn("item_id", list.items[0].item_id);
  const before = shown;
  shown = { text, k, seen, user, list };
  const same = before && before.text === text && before.k === k && before.seen === seen;
  $("board").hidden = $("user-card").hidden = false;
  $("hello").hidden = true;
  $("event-user").textContent = text;
  document.title = `${text} · everlong console`;
  const moves = showList(list, same ? before.list : null, k);
  showHistory(user, after);
  showFacts(user, text);
  showChoices(list);
  say(summary(text, user, list, moves, after));
  await showModel();
}

function summary(text, user, list, moves, after) {
  const parts = [];
  if (after)
    parts.push(
      after.new
        ? `The event is on disk and in the state: offset ${after.offset} of shard ${after.shard}.`
        : `This event had been delivered before, as offset ${after.offset}: nothing changed.`,
    );
  else if (user) parts.push(`${text}: ${plural(user.events, "event")}.`);
  else parts.push(`${text} is not known: no such user yet. An event makes one.`);
  if (list.stale) parts.push("The list is older than the event.");
  if (moves) {
    const told = Object.entries(moves).filter(([, n]) => n);
    const words = told.map(([name, n]) => `${n} ${name}`).join(", ");
    parts.push(words ? `The list: ${words}.` : "The list is as before.");
  }
  return parts.join(" ");
}

function plural(n, noun) {
  return `${count.format(n)} ${noun}${n === 1 ? "" : "s"}`;
}

/** Shows a list, with what changed since the one before; returns how much did. */
function showList(list, before, k) {
  const ranks = new Map(before?.items.map((item, rank) => [item.item_id, rank]));
  const moves = { up: 0, down: 0, new: 0, gone: 0 };
  const scores = list.items.map((item) => item.score);
  const low = Math.min(...scores);
  const range = Math.max(...scores) - low || 1;
  const tops = new Map([...$("list").children].map((row) => [row.dataset.item, row.offsetTop]));
  const rows = list.items.map((item, rank) => {
    const bar = make("span", "bar");
    bar.style.width = `${3 + (97 * (item.score - low)) / range}%`;
    const name = make("span", "id", item.item_id);
    const score = make("span", "score", shortScore(item.score));
    score.title = String(item.score);
    const row = make("li", "", make("span", "name", name, make("span", "track", bar)), score);
    row.dataset.item = item.item_id;
    if (before) {
      const change = ranks.has(item.item_id) ? ranks.get(item.item_id) - rank : NaN;
      const kind = isNaN(change) ? "new" : change > 0 ? "up" : change < 0 ? "down" : "";
      if (kind) moves[kind] += 1;
      row.append(moveMark(kind, Math.abs(change)));
    }
    return row;
  });
  $("list").replaceChildren(...rows);
  slide(rows, tops, before);
  const here = new Set(list.items.map((item) => item.item_id));
  const left = before?.items.map((item) => item.item_id).filter((id) => !here.has(id)) ?? [];
  moves.gone = left.length;
  $("gone").textContent = left.length ? `Gone: ${left.join(", ")}` : "";
  const short = list.items.length < k ? `${plural(list.items.length, "item")} only. ` : "";
  const known = list.known ? "" : "For a user without a state. ";
  $("list-about").textContent = list.items.length
    ? `${known}${short}Bars run from the lowest score here to the highest.`
    : "Nothing is left to recommend.";
  return before && moves;
}

function shortScore(score) {
  return score !== 0 && Math.abs(score) < 0.01 ? score.toExponential(1) : score.toFixed(3);
}

function moveMark(kind, by) {
  const signs = { up: `↑ ${by}`, down: `↓ ${by}`, new: "new", "": "" };
  const mark = make("span", `mark ${kind}`, signs[kind]);
  if (kind) {
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", kind === "new" ? "new in the list" : `${kind} ${by}`);
  }
  return mark;
}

/** Rows slide from where they were. */
function slide(rows, tops, before) {
  if (!before || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const row of rows) {
    const from = tops.get(row.dataset.item);
    const frames =
      from === undefined
        ? [{ opacity: 0 }, { opacity: 1 }]
        : [{ transform: `translateY(${from - row.offsetTop}px)` }, { transform: "none" }];
    row.animate(frames, { duration: 350, easing: "ease-out" });
  }
}

function showHistory(user, after) {
  const events = user?.history ?? [];
  const all = !user || user.events === events.length;
  $("history-about").textContent = !events.length
    ? "No events."
    : `${all ? "" : `The last ${events.length} of ${count.format(user.events)}. `}Newest first, UTC.`;
  const rows = [];
  events.forEach((event, place) => {
    const time = make("time", "", stamp(event.timestamp));
    time.dateTime = new Date(event.timestamp * 1000).toISOString();
    const row = make("li", "", make("span", "id", event.item_id));
    if (after?.new && event.offset === after.offset) row.classList.add("fresh");
    const older = events[place + 1];
    const pause = older ? event.timestamp - older.timestamp : 0;
    if (pause < 0) row.append(make("span", "late", `late by ${span(-pause)}`));
    row.append(time, make("span", "offset", `#${event.offset}`));
    rows.push(row);
    if (pause >= GAP_S) rows.push(make("li", "gap", `${span(pause)} between`));
  });
  $("history").replaceChildren(...rows);
}

function stamp(seconds) {
  return new Date(seconds * 1000).toISOString().replace("T", " ").replace(".000Z", "");
}

const UNITS = [
  ["day", 86_400],
  ["hour", 3_600],
  ["minute", 60],
];

function span(seconds) {
  const [unit, size] = UNITS.find(([, size]) => seconds >= size) ?? ["second", 1];
  return plural(Math.round(seconds / size), unit);
}

function showFacts(user, text) {
  const facts = user
    ? {
        Id: make("span", "id", user.user_id),
        "Events applied": count.format(user.events),
        "State size": `${count.format(user.state_bytes)} bytes`,
        "Last offset": count.format(user.last_offset),
        Shard: user.shard,
        "Newest, UTC": stamp(user.newest),
      }
    : { Id: make("span", "id", text), State: "none: not known" };
  $("user-facts").replaceChildren(...rowsOf(facts));
}

function rowsOf(facts) {
  return Object.entries(facts).map(([name, value]) =>
    make("div", "", make("dt", "", name), make("dd", "", value)),
  );
}

async function showModel() {
  const model = await ask("GET /v1/model", "v1/model");
  $("model-facts").replaceChildren(
    ...rowsOf({
      Name: model.name,
      Digest: make("span", "digest", model.digest),
      Items: count.format(model.items),
      Users: count.format(model.users),
      "Bytes per user": count.format(model.bytes_per_user),
      Previous: model.previous ? make("span", "digest", model.previous) : "none",
    }),
  );
}

function showChoices(list) {
  const chips = list.items.slice(0, CHOICES).map((item) => {
    const chip = make("button", "chip", item.item_id);
    chip.type = "button";
    chip.addEventListener("click", () => {
      $("item").value = item.item_id;
      $("send").focus();
    });
    return chip;
  });
  $("choices").replaceChildren(...chips);
}

// --- what the reader does

function search(text, { remember = true } = {}) {
  $("user").value = text;
  if (remember && new URL(location).searchParams.get("user") !== text)
    history.pushState(null, "", `?${new URLSearchParams({ user: text })}`);
  return attempt(async () => {
    try {
      await showUser(text);
    } catch (error) {
      // the page shows another user: an event must not be sent for that one by mistake
      if (shown?.text !== text) clear();
      throw error;
    }
  });
}

function clear() {
  shown = null;
  turn += 1;
  $("board").hidden = $("user-card").hidden = true;
  $("hello").hidden = false;
  document.title = "everlong console";
  say("");
}

async function sendEvent() {
  const time = $("now").checked ? Date.now() : Date.parse(`${$("time").value}Z`);
  const fields = $("fields").value.trim();
  let given = {};
  try {
    if (fields) given = parse(fields);
  } catch (error) {
    throw new Refused("Fields of the event", 0, `expected JSON: ${error.message}`);
  }
  const { text } = shown;
  const receipts = await askTyped(() =>
    ask("POST /v1/events", "v1/events", {
      events: [
        {
          user_id: typed("user_id", text),
          item_id: typed("item_id", $("item").value),
          timestamp: Math.floor(time / 1000),
          fields: given,
        },
      ],
    }),
  );
  if (shown?.text !== text) return; // the reader went on to another user
  await showUser(text, receipts.receipts[0]);
  $("item").value = "";
  $("item").focus();
}

function onSubmit(id, work) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    work();
  });
}

let sending = false; // a second Enter must not send a second event

onSubmit("search", () => search($("user").value));
onSubmit("event", async () => {
  if (sending) return;
  sending = true;
  await attempt(sendEvent);
  sending = false;
});
onSubmit("key-form", () => {
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  $("key").value = "";
  $("key-box").open = false;
  $("key-box").querySelector("summary").focus();
  showKey();
  attempt(shown ? () => showUser(shown.text) : begin);
});
$("key-box").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  $("key-box").open = false;
  $("key-box").querySelector("summary").focus();
});
for (const id of ["k", "seen"])
  $(id).addEventListener("change", () => {
    if (shown && $("search").reportValidity()) attempt(() => showUser(shown.text));
  });
$("now").addEventListener("change", () => {
  $("time-field").hidden = $("time").disabled = $("now").checked;
  if (!$("time").value) $("time").value = new Date().toISOString().slice(0, 19);
});
addEventListener("popstate", () => begin());

function showKey() {
  $("key-state").textContent = sessionStorage.getItem(KEY) ? "set" : "none";
}

// --- health

async function lamp(id, path, words) {
  let good = false;
  let text = words[1];
  try {
    const answer = await fetch(path, { cache: "no-store" });
    good = answer.ok;
    if (!good) text += `: ${(await answer.json()).detail ?? answer.status}`;
  } catch {
    text += ": no answer";
  }
  if (good) text = words[0];
  $(id).dataset.good = good;
  if ($(id).textContent !== text) $(id).textContent = text; // said aloud when it changes only
}

function look() {
  if (document.hidden) return;
  lamp("live", "livez", ["live", "not live"]);
  lamp("ready", "readyz", ["ready", "not ready"]);
}

function begin() {
  const user = new URL(location).searchParams.get("user");
  if (user) return search(user, { remember: false });
  clear();
  $("user").value = "";
  return attempt(showModel);
}

showKey();
look();
setInterval(look, POLL_MS);
document.addEventListener("visibilitychange", look);
begin();
