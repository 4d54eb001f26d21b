-- finish: the last output of a request goes to its front end, and everything that it held is free.
--   KEYS     request:<id>, queue, deadlines, counters, body:<id>
--   ARGV[2]  request id      [3] epoch      [4] instance that ends it      [5] the output, as in outputs.py
--   ARGV[6]  ms of retention [7] reason     [8...] fields and values to note in the record
--   returns  1, also when it was done before | 0: this run is over, drop it

-- Some tell how long requests take from their claim to their end. What is known follows those that took longer faster
-- than those that took less, so that nearly all take no longer.
local ONE_IN, UP, DOWN, LASTS_S = 8, 0.3, 0.003, 600

-- What else a record holds is of use only while its request is queued.
local id, r = ARGV[2], load_some(ARGV[2], {'state', 'epoch', 'frontend', 'queue', 'queue_entry', 'prefill', 'decode',
                                           'inbox_entry', 'kv_reserved', 'class', 'claimed_ms'})
if not r or r.epoch ~= ARGV[3] then return 0 end
if r.state == 'done' then return 1 end
if not is_with(ARGV[4], r) then return 0 end
unbind(id, r, ARGV[4], 'it is finished')
local num_done = close(id, 'done', ARGV[7], tonumber(ARGV[6]), unpack(ARGV, 8))
if num_done % ONE_IN == 1 and r.class and number(r.claimed_ms) > 0 then
  local key, took = P .. 'service-ms', now_ms() - r.claimed_ms
  local known = tonumber(redis.call('HGET', key, r.class) or took)
  redis.call('HSET', key, r.class, string.format('%.1f', known + (took > known and UP or DOWN) * (took - known)))
  redis.call('EXPIRE', key, LASTS_S)
end
notify(r.frontend, id, ARGV[5])
return 1
