// Shows POP in llama.cpp's own web page: a button in the corner tells the time to the first token and the pruned tokens
// of the last answer, and opens a list of the last answers with a switch for the `pop` field of requests.
//
// tools/build_page.py puts this script into the built index.html, before the page's own. The page's sources stay as
// they are, so this script listens to the requests that the page sends with fetch().
(() => {
  "use strict";

  const MOST = 10; // answers in the list
  const KEY = "pop-gguf.pop"; // "off" in the browser's storage reads prompts with all layers
  const answers = []; // the newest first

  const isOn = () => localStorage.getItem(KEY) !== "off";

  // The requests

  const originalFetch = window.fetch;

  window.fetch = async function (input, options) {
    const url = new URL(input instanceof Request ? input.url : input, document.baseURI);
    if (!url.pathname.endsWith("/v1/chat/completions") || typeof options?.body !== "string") {
      return originalFetch.call(this, input, options);
    }
    const body = JSON.parse(options.body);
    if (!isOn() && !("pop" in body)) {
      body.pop = false;
    }
    const sent = { ...options, body: JSON.stringify(body) };
    if (!body.stream) { // The page wants no answer to show.
      return originalFetch.call(this, input, sent);
    }
    const answer = { began: performance.now(), firstMs: null, timings: null, state: "reading" };
    answers.unshift(answer);
    answers.length = Math.min(answers.length, MOST);
    show();
    options.signal?.addEventListener("abort", () => end(answer, "stopped"));
    let response;
    try {
      response = await originalFetch.call(this, input, sent);
    } catch (error) {
      end(answer, "failed");
      throw error;
    }
    if (!response.ok || !response.body) {
      end(answer, "failed");
      return response;
    }
    // The page reads through this stream, so that it still hangs up when it stops to read.
    return new Response(response.body.pipeThrough(listener(answer)), response);
  };

  function listener(answer) {
    const decoder = new TextDecoder();
    let rest = "";
    return new TransformStream({
      transform(chunk, controller) {
        controller.enqueue(chunk);
        const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          try {
            if (line.startsWith("data: {")) {
              hear(answer, JSON.parse(line.slice("data: ".length)));
            }
          } catch (error) {
            console.warn("pop.js does not understand:", line, error); // The page gets the line all the same.
          }
        }
      },
      flush() {
        end(answer, "done");
      },
    });
  }

  function hear(answer, event) {
    const delta = event.choices?.[0]?.delta ?? {};
    if (answer.firstMs === null && (delta.content || delta.reasoning_content || delta.tool_calls)) {
      answer.firstMs = performance.now() - answer.began;
      answer.state = "answering";
    }
    answer.timings = event.timings ?? answer.timings;
    show();
  }

  function end(answer, state) {
    if (answer.state === "reading" || answer.state === "answering") {
      answer.state = state;
      show();
    }
  }

  // The button and its list

  const STYLE = `
    #pop-gguf { position: fixed; top: 0.6rem; right: 0.6rem; z-index: 40; max-width: calc(100vw - 4.5rem);
      display: flex; flex-direction: column; align-items: flex-end; gap: 0.3rem;
      font: 13px/1.5 system-ui, sans-serif; color: #27272a; }
    #pop-gguf button, #pop-gguf-list { background: #fff; border: 1px solid #d4d4d8; border-radius: 0.8rem; }
    #pop-gguf button { padding: 0.2rem 0.7rem; color: inherit; font: inherit; cursor: pointer; max-width: 100%; }
    #pop-gguf-list { padding: 0.7rem 0.9rem; width: 22rem; max-width: 100%; max-height: 60vh; overflow-y: auto;
      box-sizing: border-box; }
    #pop-gguf-list[hidden] { display: none; }
    #pop-gguf-list ol { margin: 0.5rem 0 0; padding: 0; list-style: none; }
    #pop-gguf-list li { padding: 0.3rem 0; border-top: 1px solid #e4e4e7; }
    #pop-gguf-list label { display: flex; gap: 0.5rem; align-items: center; cursor: pointer; }
    .dark #pop-gguf { color: #e4e4e7; }
    .dark #pop-gguf button, .dark #pop-gguf-list { background: #18181b; border-color: #3f3f46; }
    .dark #pop-gguf-list li { border-color: #3f3f46; }
    /* In a phone's corners there are the page's menu and the button that closes it. */
    @media (max-width: 768px) { #pop-gguf { right: 4.2rem; max-width: calc(100vw - 8.4rem); } }
    @media print { #pop-gguf { display: none; } }`;

  const box = element("div", { id: "pop-gguf" });
  const button = element("button", { type: "button", title: "Prefill-only pruning" });
  const panel = element("div", { id: "pop-gguf-list", hidden: true });
  const toggle = element("input", { type: "checkbox" });
  const list = element("ol", {});

  function element(name, properties, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  const milliseconds = (ms) => (ms < 10000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

  function describe(answer) {
    const texts = [answer.firstMs === null ? "no token" : `first token after ${milliseconds(answer.firstMs)}`];
    const timings = answer.timings;
    if (timings) {
      texts.push(`${timings.pruned_n} of ${timings.prompt_n} prompt tokens pruned`);
      if (timings.pruned_n) {
        texts.push(`from layer ${timings.boundary} on`);
      }
      if (timings.cache_n) {
        texts.push(`${timings.cache_n} more from the cache`);
      }
    }
    if (answer.state !== "done") {
      texts.push(answer.state);
    }
    return texts.join(", ");
  }

  function show() {
    const [last] = answers;
    const texts = [isOn() ? "POP" : "POP off"];
    if (last) {
      texts.push(last.firstMs === null ? last.state : milliseconds(last.firstMs));
      if (last.timings) {
        texts.push(`${last.timings.pruned_n}/${last.timings.prompt_n} pruned`);
      }
    }
    button.textContent = texts.join(" \u00b7 ");
    button.setAttribute("aria-expanded", String(!panel.hidden));
    toggle.checked = isOn();
    list.replaceChildren(...answers.map((answer) => element("li", { textContent: describe(answer) })));
  }

  button.addEventListener("click", () => {
    panel.hidden = !panel.hidden;
    show();
  });
  toggle.addEventListener("change", () => {
    localStorage.setItem(KEY, toggle.checked ? "on" : "off");
    show();
  });
  panel.append(element("label", {}, toggle, "prune the prompts of further questions"), list);
  box.append(button, panel);

  document.addEventListener("DOMContentLoaded", () => {
    document.head.append(element("style", { textContent: STYLE }));
    document.body.append(box);
    show();
  });
})();
