// The routes of the service, from its own description of them. All of it is put in as text.

const $ = (id) => document.getElementById(id);

function make(tag, name = "", ...content) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...content);
  return made;
}

// values that make an example readable; others follow from their type
const EXAMPLES = {
  user_id: "ann",
  item_id: "tea",
  event_id: "e1",
  candidates: ["tea", "cup"],
  folder: "/models/next",
};

let api;

function resolve(schema = {}) {
  if (!schema.$ref) return schema;
  const found = schema.$ref.split("/").slice(1).reduce((part, name) => part?.[name], api);
  return { ...found, description: schema.description ?? found?.description };
}

function nameOf(schema) {
  return schema.$ref?.split("/").at(-1);
}

/** What a value is, in a few words, with its bounds. */
function typeOf(schema = {}) {
  if (schema.$ref) return nameOf(schema);
  const any = schema.anyOf ?? schema.oneOf;
  if (any) return any.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array")
    return `list of ${typeOf(schema.items)}${bounds(schema.minItems, schema.maxItems, " items")}`;
  if (schema.type === "object" && schema.additionalProperties)
    return `object of ${typeOf(schema.additionalProperties)}`;
  if (schema.type === "string")
    return `string${bounds(schema.minLength, schema.maxLength, " characters")}`;
  return `${schema.type ?? "any"}${bounds(schema.minimum, schema.maximum)}`;
}

/** Bounds in brackets; powers of two as such, since their digits tell nobody anything. */
function bounds(least, most, unit = "") {
  const [low, high] = [least, most].map((value) => {
    const power = Math.log2(Math.abs(value));
    if (!(power > 20 && Number.isInteger(power))) return value;
    return `${value < 0 ? "-" : ""}2^${power}`;
  });
  if (low === undefined && high === undefined) return "";
  if (high === undefined) return ` (${low}${unit} or more)`;
  if (low === undefined) return ` (${high}${unit} at most)`;
  return ` (${low} to ${high}${unit})`;
}

function exampleOf(name, schema) {
  const whole = resolve(schema);
  if (whole.examples) return whole.examples[0];
  if (name in EXAMPLES) return EXAMPLES[name];
  if (name === "timestamp") return Math.floor(Date.now() / 1000);
  if (whole.default !== undefined && whole.default !== null) return whole.default;
  const any = whole.anyOf ?? whole.oneOf;
  if (any) return exampleOf(name, any[0]);
  if (whole.type === "array") return [exampleOf("", whole.items)];
  if (whole.type === "object" && whole.properties)
    return Object.fromEntries(
      Object.entries(whole.properties)
        .filter(([key]) => whole.required?.includes(key))
        .map(([key, value]) => [key, exampleOf(key, value)]),
    );
  if (whole.type === "object") return {};
  if (whole.type === "boolean") return true;
  return whole.type === "string" ? "text" : (whole.minimum ?? 1);
}

/** Names with their types, whether they must be there, and what they are. */
function list(rows) {
  const parts = rows.map(({ name, type, required, about }) => {
    const head = make("dt", "", make("code", "", name), make("span", "type", type));
    if (required) head.append(make("span", "required", "required"));
    const texts = about.filter(Boolean).join("; ");
    return make("div", "", head, ...(texts ? [make("dd", "", texts)] : []));
  });
  return make("dl", "fields", ...parts);
}

function fallback(schema = {}) {
  const { default: value } = schema;
  return value === undefined || value === null ? "" : `${JSON.stringify(value)} if left out`;
}

/** The fields of a message that is asked for or answered, then those of the messages in it. */
function fieldsOf(schema, title, { asked, seen = new Set() }) {
  const name = nameOf(schema);
  const whole = resolve(schema);
  if (!whole.properties || seen.has(name)) return [];
  seen.add(name);
  const inner = [];
  const rows = Object.entries(whole.properties).map(([key, value]) => {
    inner.push(...[value, value.items ?? {}, ...(value.anyOf ?? [])].filter(nameOf));
    return {
      name: key,
      type: typeOf(value),
      required: asked && whole.required?.includes(key),
      about: [resolve(value).description, fallback(value)],
    };
  });
  const heading = make("h3", "", title);
  const about = whole.description ? [make("p", "hint", whole.description)] : [];
  const within = inner.flatMap((part) => fieldsOf(part, nameOf(part), { asked, seen }));
  return [heading, ...about, list(rows), ...within];
}

function jsonOf(content) {
  return content?.["application/json"]?.schema;
}

function quote(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function curl(method, path, route) {
  const filled = path.replace(/\{(\w+)\}/g, (_, name) =>
    encodeURIComponent(String(exampleOf(name, {}))),
  );
  const base = new URL(".", location).href.replace(/\/$/, "");
  const parts = [`curl -s ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${base}${filled}`];
  if (route.security) parts.push('-H "Authorization: Bearer $KEY"');
  const body = jsonOf(route.requestBody?.content);
  if (body) {
    parts.push("-H 'Content-Type: application/json'");
    parts.push(`-d ${quote(JSON.stringify(exampleOf("", body)))}`);
  }
  return parts.join(" \\\n  ");
}

function routeOf(path, method, route) {
  const made = make("section", "card route");
  made.id = `${method}${path.replace(/\W+/g, "-")}`;
  const head = make("h2", "", make("span", `method ${method}`, method.toUpperCase()), path);
  head.id = `${made.id}-title`;
  made.setAttribute("aria-labelledby", head.id);
  made.append(head, make("p", "", route.description ?? route.summary ?? ""));
  const example = make("pre", "", curl(method, path, route));
  example.tabIndex = 0;
  example.setAttribute("role", "group");
  example.setAttribute("aria-label", "Example");
  made.append(example);
  if (route.parameters?.length) {
    const rows = route.parameters.map((one) => ({
      name: one.name,
      type: typeOf(one.schema),
      required: one.required,
      about: [`in the ${one.in}`, one.description, fallback(one.schema)],
    }));
    made.append(make("h3", "", "Parameters"), list(rows));
  }
  const body = jsonOf(route.requestBody?.content);
  if (body) made.append(...fieldsOf(body, `Body: ${nameOf(body) ?? ""}`, { asked: true }));
  const answers = Object.entries(route.responses);
  for (const [status, answer] of answers.filter(([status]) => status < "300")) {
    const schema = jsonOf(answer.content) ?? {};
    const fields = fieldsOf(schema, `Answer ${status}: ${nameOf(schema) ?? ""}`, { asked: false });
    made.append(...(fields.length ? fields : [make("h3", "", `Answer ${status}: ${typeOf(schema)}`)]));
  }
  const errors = answers.filter(([status]) => status >= "300");
  if (errors.length) {
    const text = errors.map(([status, answer]) => `${status} ${answer.description}`).join(", ");
    made.append(make("p", "hint", `Errors: ${text}.`));
  }
  return made;
}

async function begin() {
  try {
    const answer = await fetch("openapi.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`openapi.json: ${answer.status} ${await answer.text()}`);
    api = await answer.json();
  } catch (error) {
    $("error").textContent = error.message;
    return;
  }
  $("title").textContent = `${api.info.title} ${api.info.version}`;
  $("about").textContent = api.info.description ?? "";
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, route] of Object.entries(methods)) {
      const made = routeOf(path, method, route);
      const link = make("a", "", make("span", `method ${method}`, method.toUpperCase()), path);
      link.href = `#${made.id}`;
      $("contents").append(link);
      $("routes").append(made);
    }
  if (location.hash) $(location.hash.slice(1))?.scrollIntoView();
}

begin();
