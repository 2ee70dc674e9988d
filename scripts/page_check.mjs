// The checks of scripts/page_check.sh, which says what they need: each is a function that fails by an exception.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

const { values: options, positionals } = parseArgs({
    allowPositionals: true,
    options: { url: { type: "string" }, pictures: { type: "string" }, only: { type: "string", default: "" } },
});
const require = createRequire(join(process.env.BITNET_PAGE_CACHE, "node_modules/"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const KEY = "page-check-1234567890";
const COMPLETIONS = /\/v1\/(chat\/)?completions$/;
const scratch = mkdtempSync(join(tmpdir(), "bitnet-page-"));
const servers = [];
if (options.pictures) mkdirSync(options.pictures, { recursive: true });

/** Starts the server and returns its address, which its first line says. */
async function serve(...args) {
    const binary = positionals[0] ?? "target/release/bitnet";
    const server = spawn(binary, ["serve", "--port", "0", ...args], { stdio: ["ignore", "pipe", "inherit"] });
    servers.push(server);
    let said = "";
    const listening = new Promise((resolve, reject) => {
        server.on("error", error => reject(new Error(`${binary}: ${error.message}; cargo build --release makes it`)));
        server.on("exit", code => reject(new Error(`${binary} serve ended with ${code} before it listened`)));
        server.stdout.on("data", piece => {
            said += piece;
            const address = said.match(/^listening on (http:\S+)\n/);
            if (address) resolve(address[1]);
        });
    });
    const url = await listening;
    await until(async () => (await fetch(`${url}/ready`)).ok, "the model is loaded", 60_000);
    return url;
}

async function until(condition, what, limit = 15_000) {
    for (const end = Date.now() + limit; Date.now() < end; ) {
        if (await condition()) return;
        await new Promise(resolve => setTimeout(resolve, 100));
    }
    assert.fail(`after ${limit / 1000} s still not: ${what}`);
}

/** A fresh tab with everything it complained of. */
async function open(browser, url, { context = {}, before = async () => {} } = {}) {
    const tab = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...context });
    const page = await tab.newPage();
    page.setDefaultTimeout(15_000);
    const complaints = [];
    page.on("console", message => {
        if (["error", "warning"].includes(message.type())) complaints.push(`console: ${message.text()}`);
    });
    page.on("pageerror", error => complaints.push(`exception: ${error.message}`));
    page.on("request", request => {
        if (new URL(request.url()).origin !== new URL(url).origin) complaints.push(`request elsewhere: ${request.url()}`);
    });
    await page.addInitScript(() => {
        const tell = event => console.error(`CSP violation: ${event.violatedDirective} ${event.blockedURI}`);
        document.addEventListener("securitypolicyviolation", tell);
    });
    await before(page);
    page.response = await page.goto(url);
    page.complaints = complaints;
    return page;
}

const stats = async url => (await fetch(`${url}/stats`)).json();
const picture = async (page, name) => {
    if (options.pictures) await page.screenshot({ path: join(options.pictures, `${name}.png`) });
};
const replies = page => page.locator("article.reply");
const ended = page => page.locator("article.reply[aria-busy=false]").last().waitFor();

/** Sends by Enter; a model without a chat template continues the text instead. Returns the reply's text. */
async function say(page, text, tokens = 24) {
    await page.evaluate(tokens => (document.getElementById("max-tokens").value = tokens), tokens);
    const count = await replies(page).count();
    await page.locator("#message").fill(text);
    await page.keyboard.press("Enter");
    const instead = page.getByRole("button", { name: "Continue this text instead" });
    await until(async () => (await replies(page).count()) > count, "a reply");
    await replies(page).last().locator(".foot").waitFor();
    if (await instead.count()) {
        assert.match(await page.getByRole("alert").textContent(), /chat template/);
        page.complaints.splice(0); // the browser tells of every refusal
        await instead.click();
        await replies(page).last().locator(".foot.muted").waitFor();
    }
    return replies(page).last().locator(".text").textContent();
}

/** Answers completions from here: server-sent events with these pieces, or with a refusal. */
const answer = (page, pieces) => page.route(COMPLETIONS, route => {
    const chat = route.request().url().includes("/chat/");
    const event = piece => ({ choices: [{ index: 0, ...(chat ? { delta: { content: piece } } : { text: piece }) }] });
    const lines = [...pieces.map(event), { choices: [{ index: 0, delta: {}, text: "", finish_reason: "stop" }] }];
    const body = [...lines.map(line => JSON.stringify(line)), "[DONE]"].map(data => `data: ${data}\r\n\r\n`).join("");
    return route.fulfill({ contentType: "text/event-stream", body });
});

/** Hands every stream to the page byte by byte, so that characters, lines and events are all cut. */
const byteByByte = () => {
    const real = window.fetch;
    window.fetch = async (...args) => {
        const response = await real(...args);
        if (!String(args[0]).endsWith("completions") || !response.ok) return response;
        const bytes = new Uint8Array(await response.arrayBuffer());
        const stream = new ReadableStream({
            start(controller) {
                for (let at = 0; at < bytes.length; at += 1) controller.enqueue(bytes.slice(at, at + 1));
                controller.close();
            },
        });
        return new Response(stream, { status: response.status, headers: response.headers });
    };
};

async function accessible(page, what) {
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => window.axe.run({ resultTypes: ["violations"] }));
    const serious = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
    const told = serious.map(({ id, nodes }) => `${id}: ${nodes.map(node => node.html.slice(0, 120)).join(" | ")}`);
    assert.deepEqual(told, [], what);
    return violations.map(({ id }) => id);
}

const wide = page => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
const focused = page => page.evaluate(() => {
    const { id, tagName, textContent } = document.activeElement;
    return id || (tagName === "ASIDE" ? tagName : textContent);
});
const clean = page => assert.deepEqual(page.complaints, []);

const checks = {
    async "loads under a strict policy, without a complaint, and lists the models"(browser, url) {
        const page = await open(browser, url);
        const policy = page.response.headers()["content-security-policy"] ?? "";
        assert.match(policy, /default-src 'none'/);
        assert.match(policy, /script-src [^;]*'(sha256|nonce)-/);
        assert.doesNotMatch(policy, /unsafe-inline|unsafe-eval|\*/);
        await page.locator("#model option").first().waitFor({ state: "attached" });
        const listed = (await (await fetch(`${url}/v1/models`)).json()).data.map(({ id }) => id);
        assert.deepEqual((await page.locator("#model option").evaluateAll(all => all.map(one => one.value))).sort(), listed.sort());
        await page.locator("#state[data-state=ready]").waitFor();
        assert.equal(await focused(page), "message");
        clean(page);
        return page;
    },

    async "a message streams a reply, with its numbers, and it can be copied"(browser, url) {
        const page = await open(browser, url, { context: { permissions: ["clipboard-read", "clipboard-write"] } });
        await page.evaluate(() => {
            window.sizes = new Set();
            const log = document.getElementById("log");
            new MutationObserver(() => window.sizes.add(log.textContent.length)).observe(log, { subtree: true, characterData: true });
        });
        const text = await say(page, "Once upon a time");
        assert.ok(text.trim(), "the reply has text");
        assert.ok((await page.evaluate(() => window.sizes.size)) > 1, "it came in pieces");
        const foot = await replies(page).last().locator(".foot").textContent();
        assert.match(foot, /(finished|reached the limit).*\d tokens read, \d+ written.*tokens\/s.*first after/);
        assert.equal(await page.locator("#said").textContent(), `Reply: ${text}`);
        await page.getByRole("button", { name: "Copy" }).click();
        await page.getByRole("button", { name: "Copied" }).waitFor();
        assert.equal(await page.evaluate(() => navigator.clipboard.readText()), text);
        await picture(page, "reply");
        clean(page);
        return page;
    },

    async "Stop ends a reply, in the page and in the server"(browser, url) {
        const page = await open(browser, url);
        await say(page, "Once upon a time", 2); // chooses the mode
        for (const how of ["button", "Escape"]) {
            const count = await replies(page).count();
            await page.evaluate(how => {
                document.getElementById("max-tokens").value = 200;
                const log = document.getElementById("log");
                const observer = new MutationObserver(() => { // at the first piece: small models are fast
                    observer.disconnect();
                    if (how === "button") document.getElementById("stop").click();
                    else document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
                });
                observer.observe(log, { subtree: true, characterData: true });
            }, how);
            await page.locator("#message").fill("A long story");
            await page.keyboard.press("Enter");
            await until(async () => (await replies(page).count()) > count, "a second reply");
            await ended(page);
            assert.match(await replies(page).last().locator(".foot").textContent(), /stopped/, how);
            assert.equal(await focused(page), "message");
            assert.equal(await page.locator("#said").textContent(), "Stopped.");
            await until(async () => (await stats(url)).engine.running === 0, "running is 0", 3_000);
        }
        clean(page);
        return page;
    },

    async "the keyboard is enough"(browser, url) {
        const page = await open(browser, url);
        await page.locator("#model option").first().waitFor({ state: "attached" });
        const order = [await focused(page)];
        for (let steps = 0; steps < 20 && !order.at(-1).startsWith("Skip"); steps += 1) {
            await page.keyboard.press("Shift+Tab");
            order.push(await focused(page));
            const ring = await page.evaluate(() => {
                const element = document.activeElement;
                return getComputedStyle(element.closest(".modes") ?? element).outlineStyle;
            });
            assert.notEqual(ring, "none", `${order.at(-1)} shows its focus`);
        }
        assert.deepEqual(order, ["message", "log", "Settings", "new", "chat", "model", "Skip to the message"]);
        await page.keyboard.press("Enter");
        assert.equal(await focused(page), "message");
        for (const next of ["send", "ASIDE"]) {
            await page.keyboard.press("Tab");
            assert.equal(await focused(page), next);
        }
        await page.evaluate(() => document.getElementById("model").focus());
        await page.keyboard.press("Tab");
        await page.keyboard.press("ArrowRight");
        assert.ok(await page.locator("#continue").isChecked());
        await page.keyboard.press("Tab");
        await page.keyboard.press("Tab");
        await page.keyboard.press("Enter"); // opens the settings
        await page.keyboard.press("Tab");
        await page.keyboard.press("Tab");
        assert.equal(await focused(page), "max-tokens");
        await page.keyboard.type("8");
        await page.keyboard.press("Tab");
        await page.keyboard.press("Tab");
        assert.equal(await focused(page), "message");
        await page.keyboard.type("One");
        await page.keyboard.press("Shift+Enter");
        await page.keyboard.type("Two");
        assert.equal(await page.locator("#message").inputValue(), "One\nTwo");
        await page.keyboard.press("Enter");
        await ended(page);
        assert.equal(await page.locator(".yours .text").textContent(), "One\nTwo");
        assert.equal(await page.locator("#message").inputValue(), "");
        assert.equal(await focused(page), "message");
        clean(page);
        return page;
    },

    async "a new conversation forgets, and a system prompt is sent"(browser, url) {
        const page = await open(browser, url);
        const asked = [];
        await answer(page, ["Yes", "."]);
        page.on("request", request => { if (COMPLETIONS.test(request.url())) asked.push(request.postDataJSON()); });
        await page.locator("#settings summary").click();
        await page.locator("#system").fill("Be kind.");
        await page.locator("#temperature").fill("0.5");
        for (const text of ["One?", "Two?"]) await say(page, text);
        await page.getByRole("button", { name: "New conversation" }).click();
        assert.equal(await replies(page).count(), 0);
        await say(page, "Three?");
        const system = { role: "system", content: "Be kind." }, reply = { role: "assistant", content: "Yes." };
        const user = content => ({ role: "user", content });
        assert.deepEqual(asked.map(({ messages }) => messages), [
            [system, user("One?")],
            [system, user("One?"), reply, user("Two?")],
            [system, user("Three?")],
        ]);
        assert.deepEqual([asked[0].temperature, asked[0].max_tokens, asked[0].stream], [0.5, 24, true]);
        clean(page);
        return page;
    },

    async "a model without a chat template continues a text, and nothing goes on with it"(browser, url) {
        const page = await open(browser, url);
        const asked = [];
        await answer(page, [" a time"]);
        await page.route("**/v1/chat/completions", route => route.fulfill({
            status: 400,
            json: { error: { message: "the model has no chat template: ask /v1/completions" } },
        }));
        page.on("request", request => { if (request.url().endsWith("/v1/completions")) asked.push(request.postDataJSON().prompt); });
        await page.locator("#system").evaluate(field => (field.value = "Be kind."));
        assert.equal(await say(page, "Once upon"), " a time");
        assert.ok(await page.locator("#continue").isChecked());
        await say(page, "");
        assert.deepEqual(asked, ["Once upon", "Once upon a time"]);
        assert.equal(await page.locator("article").count(), 3); // a text and its two continuations
        clean(page);
        return page;
    },

    async "charts and the table get values, and rest while the tab is hidden"(browser, url) {
        const page = await open(browser, url);
        await say(page, "Once upon a time");
        const polls = [];
        page.on("request", request => { if (request.url().endsWith("/stats")) polls.push(request.url()); });
        await until(async () => polls.length >= 3, "three measurements");
        const rows = await page.locator("#charts tr").evaluateAll(rows => rows.map(row => ({
            name: row.querySelector("th").textContent,
            value: row.querySelector("td").textContent,
            line: row.querySelector("path.first").getAttribute("d"),
            hidden: row.querySelector("svg").closest("[aria-hidden=true]") !== null,
        })));
        assert.equal(rows.length, 7);
        for (const { name, value, line, hidden } of rows) {
            assert.ok(hidden, `the chart of ${name} is hidden from screen readers`);
            assert.match(value, /\d/, name);
            assert.match(line, /^M[\d.,]+(L[\d.,]+)*h0/, name);
        }
        assert.match(await page.locator("#facts").textContent(), /Answers by status200: \d+/);
        await page.evaluate(() => {
            Object.defineProperty(document, "hidden", { configurable: true, get: () => true });
            document.dispatchEvent(new Event("visibilitychange"));
        });
        await new Promise(resolve => setTimeout(resolve, 1_000)); // one may be under way
        const before = polls.length;
        await new Promise(resolve => setTimeout(resolve, 5_000));
        assert.equal(polls.length, before, "no measurement while hidden");
        await page.evaluate(() => {
            delete document.hidden;
            document.dispatchEvent(new Event("visibilitychange"));
        });
        await until(async () => polls.length > before, "measurements again");
        clean(page);
        return page;
    },

    async "states and alerts of the server are told"(browser, url) {
        let state = "draining";
        const page = await open(browser, url, {
            before: page => page.route("**/stats", async route => {
                const json = await (await route.fetch()).json();
                const alerts = [{ name: "memory", value: 0.95, threshold: 0.9, since: 1_790_000_000 }];
                await route.fulfill({ json: { ...json, state, alerts } });
            }),
        });
        await page.getByRole("status").filter({ hasText: "shutting down" }).waitFor();
        await page.getByRole("status").filter({ hasText: "memory: 0.95 when first seen, beyond 0.9" }).waitFor();
        state = "loading";
        await page.getByRole("status").filter({ hasText: "loading the model" }).waitFor();
        await accessible(page, "with an alert");
        await picture(page, "alert");
        clean(page);
        return page;
    },

    async "a hostile reply, cut anywhere, stays text"(browser, url) {
        const page = await open(browser, url, { before: page => page.addInitScript(byteByByte) });
        const pieces = ["<img src=x onerror=\"document.title='owned'\">", "<script>document.title='owned'</script>", " 🦊 naïve\n", "“ẞ” 👩‍🚀"];
        await answer(page, pieces);
        assert.equal(await say(page, "<b>Hello</b>"), pieces.join(""));
        assert.equal(await page.locator(".yours .text").textContent(), "<b>Hello</b>");
        assert.equal(await page.locator("article :is(img, script, b)").count(), 0);
        assert.equal(await page.title(), "bitnet");
        clean(page);
        return page;
    },

    async "refusals and broken connections are told"(browser, url) {
        const page = await open(browser, url);
        const answers = [
            route => route.fulfill({ status: 429, headers: { "Retry-After": "7" }, json: { error: { message: "the queue is full" } } }),
            route => route.fulfill({ contentType: "text/event-stream", body: 'data: {"error": {"message": "out of memory"}}\n\n' }),
            route => route.fulfill({ contentType: "text/event-stream", body: 'data: {"choices": [{"text": "a", "delta": {"content": "a"}}]}\n\n' }),
            route => route.abort(),
        ];
        const told = [/the queue is full \(try again in 7 s\)/, /out of memory/, /ended before the reply/, /cannot be reached/];
        await page.route(COMPLETIONS, route => answers.shift()(route));
        for (const expected of told) {
            const again = page.getByRole("button", { name: "Try again" });
            if (await again.count()) await again.click();
            else {
                await page.locator("#message").fill("Hello");
                await page.keyboard.press("Enter");
            }
            await page.getByRole("alert").filter({ hasText: expected }).waitFor();
        }
        await accessible(page, "with an error");
        await picture(page, "error");
        await page.unroute(COMPLETIONS);
        return page;
    },

    async "a key is asked for once, kept in the tab, and sent"(browser, url) {
        let keyed = url, before = async () => {};
        if (options.url) {
            before = page => page.route(/\/(stats|v1\/.*)$/, route => route.request().headers().authorization === `Bearer ${KEY}`
                ? route.fallback() : route.fulfill({ status: 401, json: { error: { message: "no such key" } } }));
        } else {
            const file = join(scratch, "keys");
            writeFileSync(file, `page:${KEY}\n`, { mode: 0o600 });
            keyed = await serve("--api-keys", file);
        }
        const page = await open(browser, keyed, { before });
        const field = page.getByLabel("API key", { exact: true }).and(page.locator("input"));
        await field.waitFor();
        assert.equal(await focused(page), "key");
        assert.equal(await page.locator("#state").textContent(), "API key needed");
        await accessible(page, "with the field of the key");
        await picture(page, "key");
        const count = page.complaints.length;
        await new Promise(resolve => setTimeout(resolve, 4_500));
        assert.equal(page.complaints.length, count, "it does not ask the server again and again");
        await page.locator("#message").fill("Hello");
        await page.keyboard.press("Enter");
        await page.getByRole("alert").waitFor();
        assert.equal(await focused(page), "key");
        await page.keyboard.type("wrong-key");
        await page.keyboard.press("Enter");
        await page.getByText("The server refused this API key.").waitFor();
        await field.fill(KEY);
        await page.keyboard.press("Enter");
        await page.locator("#state[data-state=ready]").waitFor();
        assert.ok(!(await page.locator("#key-form").isVisible()));
        await page.reload();
        await page.locator("#state[data-state=ready]").waitFor();
        assert.equal(await page.evaluate(() => sessionStorage.getItem("bitnet-key")), KEY);
        assert.equal(await page.evaluate(() => localStorage.length + document.cookie.length), 0);
        assert.ok((await say(page, "Once upon a time")).trim());
        return page;
    },

    async "no serious fault of accessibility, in light and dark, nor a horizontal scroll at 320 px and 200 %"(browser, url) {
        const sizes = { wide: { width: 1280, height: 800 }, narrow: { width: 320, height: 640 }, zoomed: { width: 640, height: 400 } };
        for (const colorScheme of ["light", "dark"]) {
            for (const [name, viewport] of Object.entries(sizes)) {
                const context = { colorScheme, viewport, deviceScaleFactor: 2, reducedMotion: "reduce" };
                const page = await open(browser, url, { context });
                await page.locator("#facts dt").first().waitFor();
                await picture(page, `${name}-${colorScheme}-empty`);
                const others = new Set(await accessible(page, `${name}, ${colorScheme}, empty`));
                await page.locator("#settings summary").click();
                await say(page, "Once upon a time there was a word thatisverylong".padEnd(150, "ong"));
                await until(async () => (await page.locator("#charts path.first").first().getAttribute("d")).includes("L"), "a line");
                for (const id of await accessible(page, `${name}, ${colorScheme}, with a reply`)) others.add(id);
                assert.ok((await wide(page)) <= 0, `${name}: the page is ${await wide(page)} px too wide`);
                await picture(page, `${name}-${colorScheme}`);
                if (others.size) console.log(`   not serious, ${name}, ${colorScheme}: ${[...others].join(", ")}`);
                clean(page);
                await page.context().close();
            }
        }
    },
};

const chosen = Object.entries(checks).filter(([name]) => name.includes(options.only));
let failed = 0;
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM });
try {
    if (!chosen.length) throw new Error(`no check has "${options.only}" in its name`);
    const url = options.url?.replace(/\/$/, "") ?? (await serve());
    for (const [name, check] of chosen) {
        try {
            const page = await check(browser, url);
            await page?.context().close();
            console.log(`ok      ${name}`);
        } catch (error) {
            failed += 1;
            console.log(`FAILED  ${name}\n${error.stack}`);
        }
    }
    if (options.url) console.log("note    the keys were asked for by the check, not by this server");
    console.log(failed ? `${failed} of ${chosen.length} checks failed` : `${chosen.length} checks passed`);
} catch (error) {
    failed = 1;
    console.error(`page_check: ${error.message}`);
} finally {
    await browser.close();
    for (const server of servers) server.kill("SIGTERM");
    rmSync(scratch, { recursive: true });
}
process.exit(failed ? 1 : 0);
