// node mint.js kid:secret module:function '["args"]' '{"kwargs": 1}'  > token
// then: curl --data-binary @token -H 'Content-Type: application/jose' http://127.0.0.1:8080/_ah/queue/deferred

import { mint, typed } from "./producer.js";

const [key, callable, args = "[]", kwargs = "{}", options = "{}"] = process.argv.slice(2);
const [kid, k] = key.split(":");
process.stdout.write(await mint({ kid, k }, callable, typed(JSON.parse(args)), typed(JSON.parse(kwargs)), JSON.parse(options)));
