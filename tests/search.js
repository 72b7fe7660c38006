// The search of the site, outside of a browser: `node search.js SITE QUERY...` prints what each query finds, as JSON.
// It runs the worker that the pages run, on the index that they load.
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [site, ...queries] = process.argv.slice(2);
const workers = path.join(site, "assets", "javascripts", "workers");
const worker = fs.readdirSync(workers).find((name) => /^search\..*\.js$/.test(name));
const { config, docs } = JSON.parse(fs.readFileSync(path.join(site, "search", "search_index.json"), "utf8"));

let onMessage, onAnswer;
globalThis.self = globalThis;
globalThis.addEventListener = (_, listener) => (onMessage = listener);
globalThis.postMessage = (message) => onAnswer(message.data);
vm.runInThisContext(fs.readFileSync(path.join(workers, worker), "utf8"));

const send = (type, data) =>
  new Promise((resolve) => {
    onAnswer = resolve;
    onMessage({ data: { type, data } });
  });

(async () => {
  await send(0, { config, docs, options: {} });
  const found = {};
  for (const query of queries) {
    const { items } = await send(2, query);
    const sections = items.flat().filter((section) => Object.values(section.terms).every(Boolean) && section.score > 0);
    found[query] = sections.map((section) => section.location);
  }
  console.log(JSON.stringify(found));
})();
