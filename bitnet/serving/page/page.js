// A chat with the server that this page came from. A conversation is a tree: editing a message or asking again makes a
// branch beside the old one, and `chosen` says which branch is shown.
"use strict";

const $ = (id) => document.getElementById(id);
const OPTIONS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const SAVED = [...OPTIONS, "system"];
const ALTERNATIVES = 5;

let models = [];
let root = newNode("root", "");
let running = null; // {node, controller} while an answer is being written

function newNode(role, text, parent = null) {
  return { role, text, parent, children: [], chosen: 0, tokens: [], shown: false, numbers: "", cut: false };
}

function add(parent, role, text) {
  const node = newNode(role, text, parent);
  parent.children.push(node);
  parent.chosen = parent.children.length - 1;
  return node;
}

function path() {
  const found = [];
  for (let node = root; node.children.length; found.push(node)) node = node.children[node.chosen];
  return found;
}

// Settings

function readSettings() {
  const found = {};
  for (const name of OPTIONS) {
    const value = $(name).value.trim();
    if (value !== "" && $(name).validity.valid) found[name] = Number(value);
  }
  return found;
}

function showOutputs() {
  for (const output of document.querySelectorAll("aside output")) output.value = $(output.htmlFor.value).value;
}

function saveSettings() {
  showOutputs();
  localStorage.setItem("bitnet", JSON.stringify(Object.fromEntries(SAVED.map((name) => [name, $(name).value]))));
  sessionStorage.setItem("bitnet key", $("key").value); // gone with the tab
}

function loadSettings() {
  let saved = {};
  try { saved = JSON.parse(localStorage.getItem("bitnet")) || {}; } catch { /* somebody else's */ }
  for (const name of SAVED) if (typeof saved[name] === "string") $(name).value = saved[name];
  $("key").value = sessionStorage.getItem("bitnet key") || "";
  showOutputs();
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
  (open ? $("system") : $("settings-button")).focus();
}

// The server

async function call(place, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const answer = await fetch(place, { ...options, headers });
  if (answer.ok) return answer;
  let message = `The server answered ${answer.status}.`;
  try { message = (await answer.json()).error.message; } catch { /* not ours */ }
  if (answer.status === 401) message += " (Settings, at the bottom.)";
  throw new Error(message);
}

async function* serverSentEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function currentModel() {
  return models.find((model) => model.id === $("model").value);
}

async function loadModels() {
  try {
    models = (await (await call("v1/models")).json()).data;
    $("model").replaceChildren(...models.map((model) => new Option(model.id)));
    fail("");
    showContext(0);
  } catch (error) {
    fail(error.message);
  }
}

async function requestFor(messages) {
  const common = { model: $("model").value, stream: true, stream_options: { include_usage: true }, ...readSettings() };
  if (currentModel().chat) {
    const system = $("system").value.trim();
    const before = system ? [{ role: "system", content: system }] : [];
    const said = messages.map((node) => ({ role: node.role, content: node.text }));
    return ["v1/chat/completions", { ...common, messages: [...before, ...said], logprobs: true, top_logprobs: ALTERNATIVES }];
  }
  // A base model goes on with the text so far.
  const prompt = messages.map((node) => node.text).join("");
  const max_tokens = common.max_tokens || await fitting(prompt);
  return ["v1/completions", { ...common, prompt, max_tokens, logprobs: ALTERNATIVES }];
}

// 200 tokens, or what is left behind the prompt.
async function fitting(prompt) {
  const body = JSON.stringify({ model: $("model").value, prompt });
  const { count, max_model_len } = await (await call("tokenize", { method: "POST", body })).json();
  return Math.max(1, Math.min(200, max_model_len - count));
}

function tokensOf(choice) {
  if (choice.logprobs?.content) {
    return choice.logprobs.content.map((token) => ({
      text: token.token, logprob: token.logprob, best: token.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  const legacy = choice.logprobs;
  return (legacy?.tokens || []).map((text, i) => ({
    text, logprob: legacy.token_logprobs[i], best: Object.entries(legacy.top_logprobs[i] || {}),
  }));
}

async function write(parent) {
  const node = add(parent, "assistant", "");
  const controller = new AbortController();
  running = { node, controller };
  fail("");
  const said = path().slice(0, -1);
  draw();
  const started = performance.now();
  let first = 0;
  let usage = null;
  try {
    const [place, body] = await requestFor(said);
    const answer = await call(place, { method: "POST", body: JSON.stringify(body), signal: controller.signal });
    for await (const chunk of serverSentEvents(answer)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      for (const choice of chunk.choices) {
        first = first || performance.now();
        node.text += choice.delta ? choice.delta.content || "" : choice.text;
        node.tokens.push(...tokensOf(choice));
        node.cut = choice.finish_reason === "length";
      }
      drawAnswer(node);
      showSpeed(node, usage, started, first);
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  }
  showSpeed(node, usage, started, first);
  running = null;
  if (!node.text && !node.tokens.length) { // nothing came: the question stays, to be sent again
    parent.children.pop();
    parent.chosen = Math.max(0, parent.children.length - 1);
  }
  draw();
  $("status").textContent = node.text ? `Answer: ${node.text}` : "No answer.";
}

function showSpeed(node, usage, started, first) {
  const count = usage ? usage.completion_tokens : node.tokens.length;
  const seconds = (performance.now() - first) / 1000;
  const rate = count > 1 && first ? `${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  const wait = first ? `first after ${((first - started) / 1000).toFixed(1)} s` : "";
  node.numbers = [`${count} tokens`, rate, wait, node.cut ? "cut at its longest" : ""].filter(Boolean).join(" · ");
  if (usage) showContext(usage.total_tokens);
}

function showContext(used) {
  const size = currentModel()?.max_model_len || 1;
  $("context").max = size;
  $("context").value = used;
  $("context").high = size * 0.9;
  $("context-text").textContent = used ? `Context: ${used} of ${size} tokens` : `Context: ${size} tokens`;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// The conversation

function button(text, action, label) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

function draw() {
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  list.replaceChildren(...path().map(drawMessage));
  if (atEnd || running) list.scrollTop = list.scrollHeight;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

function drawMessage(node) {
  const item = $("message").content.firstElementChild.cloneNode(true);
  node.item = item;
  item.className = node.role;
  item.classList.toggle("writing", running?.node === node);
  item.querySelector(".who").textContent = node.role === "user" ? "You" : "Model";
  const form = item.querySelector(".edit");
  form.addEventListener("submit", (event) => { event.preventDefault(); branch(node, form.querySelector("textarea").value); });
  form.querySelector(".cancel").addEventListener("click", () => { form.hidden = true; });
  drawAnswer(node);
  if (!running) drawTools(node, item);
  return item;
}

function drawAnswer(node) {
  const item = node.item;
  item.querySelector(".text").textContent = node.text;
  item.querySelector(".text").hidden = node.shown;
  for (const part of [".tokens", ".legend"]) item.querySelector(part).hidden = !node.shown;
  if (node.shown) drawTokens(node, item);
  let numbers = item.querySelector(".numbers");
  if (node.role === "assistant" && !numbers) {
    numbers = document.createElement("span");
    numbers.className = "numbers";
    item.querySelector(".tools").append(numbers);
  }
  if (numbers) numbers.textContent = node.numbers;
  const list = $("messages");
  if (running?.node === node && list.scrollHeight - list.scrollTop - list.clientHeight < 120) list.scrollTop = list.scrollHeight;
}

function drawTools(node, item) {
  const tools = item.querySelector(".tools");
  const siblings = node.parent.children;
  const found = [];
  if (siblings.length > 1) {
    const step = (by) => () => { node.parent.chosen = (node.parent.chosen + by + siblings.length) % siblings.length; draw(); };
    const place = document.createElement("span");
    place.textContent = `${node.parent.chosen + 1} of ${siblings.length}`;
    found.push(button("‹", step(-1), "Earlier branch"), place, button("›", step(1), "Later branch"));
  }
  if (node.role === "user") {
    found.push(button("Edit", () => {
      const form = item.querySelector(".edit");
      form.hidden = false;
      form.querySelector("textarea").value = node.text;
      form.querySelector("textarea").focus();
    }));
  } else {
    found.push(button("Write again", () => write(node.parent)));
    const view = button(node.shown ? "Show text" : "Show tokens", () => { node.shown = !node.shown; draw(); });
    view.setAttribute("aria-pressed", String(node.shown));
    found.push(view, button("Copy", async () => {
      try { await navigator.clipboard.writeText(node.text); $("status").textContent = "Copied."; } catch { fail("The browser does not let this page copy."); }
    }));
  }
  tools.prepend(...found);
}

function branch(node, text) {
  if (!text.trim() || running) return;
  write(add(node.parent, "user", text));
}

// Tokens, coloured by probability; arrow keys go from one to the next

function level(logprob) {
  const p = Math.exp(logprob);
  return p >= 0.9 ? "p9" : p >= 0.7 ? "p7" : p >= 0.5 ? "p5" : p >= 0.3 ? "p3" : p >= 0.1 ? "p1" : "p0";
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value < 0.1 ? "under 0.1%" : `${value.toFixed(value < 10 ? 1 : 0)}%`;
}

function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(nothing)";
}

function drawTokens(node, item) {
  const box = item.querySelector(".tokens");
  const spans = node.tokens.map((token, index) => {
    const span = document.createElement("span");
    span.className = `token ${level(token.logprob)}`;
    span.textContent = token.text.startsWith("bytes:") ? "�" : token.text;
    span.setAttribute("role", "option");
    span.setAttribute("aria-label", `${visible(token.text)}, ${percent(token.logprob)}`);
    span.setAttribute("aria-selected", "false");
    span.tabIndex = index ? -1 : 0;
    span.addEventListener("click", () => choose(index));
    return span;
  });
  function choose(index) {
    spans.forEach((span, i) => { span.tabIndex = i === index ? 0 : -1; span.setAttribute("aria-selected", String(i === index)); });
    spans[index].focus();
    showAlternatives(item, node.tokens[index]);
  }
  box.onkeydown = (event) => {
    const at = spans.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    const target = event.key === "Enter" || event.key === " " ? at : next;
    if (at < 0 || target === undefined) return;
    event.preventDefault();
    if (spans[target]) choose(target);
  };
  box.replaceChildren(...spans);
}

function showAlternatives(item, token) {
  const box = item.querySelector(".alternatives");
  const table = document.createElement("table");
  const caption = table.createCaption();
  caption.textContent = `${visible(token.text)} had ${percent(token.logprob)}`;
  const others = token.best.some(([text]) => text === token.text) ? token.best : [...token.best, [token.text, token.logprob]];
  for (const [text, logprob] of others) {
    const row = table.insertRow();
    row.classList.toggle("chosen", text === token.text);
    row.insertCell().textContent = visible(text);
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = Math.exp(logprob);
    bar.setAttribute("aria-hidden", "true");
    row.insertCell().append(bar);
    row.insertCell().textContent = percent(logprob);
  }
  box.replaceChildren(table);
  box.hidden = false;
}

// Controls

function fit() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || running || !currentModel()) return;
  $("prompt").value = "";
  fit();
  const last = path().at(-1) || root;
  write(add(last, "user", text));
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("prompt").addEventListener("input", fit);
$("stop").addEventListener("click", () => { running?.controller.abort(); $("prompt").focus(); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.controller.abort();
  else if (!$("settings").hidden) openSettings(false);
});
$("new").addEventListener("click", () => {
  running?.controller.abort();
  root = newNode("root", "");
  fail("");
  showContext(0);
  draw();
  $("prompt").focus();
});
$("settings-button").addEventListener("click", () => openSettings($("settings").hidden));
$("settings-close").addEventListener("click", () => openSettings(false));
$("settings").addEventListener("input", saveSettings);
$("key").addEventListener("change", loadModels);
$("model").addEventListener("change", () => showContext(0));

loadSettings();
loadModels();
draw();
