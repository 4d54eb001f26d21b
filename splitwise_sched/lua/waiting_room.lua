-- waiting room: where requests wait while the queue stream is long enough for those who claim from it.
--
-- The stream is kept short, since what is in it is served in order. Who enters it next is decided here, by weighted
-- fair queueing on two levels (Goyal et al., Start-time Fair Queueing, SIGCOMM 1996): between classes by their weights,
-- inside a class between tenants equally; the cost of a request is the KV tokens that it reserves. Of a tenant's
-- requests in a class the one with the earliest deadline goes first. A flow that was idle saves nothing up: it starts
-- at the virtual time. An empty room costs one EXISTS a submit.
--
--   waiting                     ZSET  class by the start of its next service (virtual time)
--   waiting:<class>             ZSET  tenant, likewise
--   waiting:<class>:<tenant>    ZSET  request id by deadline (ms)
--   served:<ring>               ZSET  flows that have left a ring ahead of the virtual time, by the end of their service
--   virtual-time                HASH  by ring: "classes", "class:<class>"
-- The last two are kept for a while when the room is empty, so that shares hold over short lulls, and then go.

local SHORT_QUEUE = 64
local MEMORY_MS = 600000

-- queue entries that no instance has claimed; XPENDING would tell it too, but goes through all consumers
local function unclaimed(length)
  length = length or redis.call('XLEN', P .. 'queue')
  local groups = length > 0 and redis.pcall('XINFO', 'GROUPS', P .. 'queue') or {}
  for _, group in ipairs(groups) do
    local named = {}
    for i = 1, #group, 2 do named[group[i]] = group[i + 1] end
    if named.name == 'prefill' then return length - named.pending end
  end
  return length
end

local function activate(key, ring, flow)
  local now = tonumber(redis.call('HGET', P .. 'virtual-time', ring) or 0)
  local ended = tonumber(redis.call('ZSCORE', P .. 'served:' .. ring, flow) or 0)
  redis.call('ZADD', key, 'NX', math.max(now, ended), flow)
end

-- the flow that is first in a ring was served `amount`; it stays in it while it has more
local function charge(key, ring, flow, amount, has_more)
  local start = tonumber(redis.call('ZSCORE', key, flow))
  redis.call('HSET', P .. 'virtual-time', ring, string.format('%.6f', start))
  if has_more then
    redis.call('ZADD', key, start + amount, flow)
  else
    redis.call('ZREM', key, flow)
    redis.call('ZREMRANGEBYSCORE', P .. 'served:' .. ring, '-inf', start)
    redis.call('ZADD', P .. 'served:' .. ring, start + amount, flow)
  end
end

local function room_of(class, tenant)
  return P .. 'waiting:' .. class .. ':' .. tenant
end

-- how each ring was served stays while somebody waits, and then for MEMORY_MS
local function keep_shares(how_long)
  for _, ring in ipairs(redis.call('HKEYS', P .. 'virtual-time')) do how_long(P .. 'served:' .. ring) end
  how_long(P .. 'virtual-time')
end

local function for_good(key) redis.call('PERSIST', key) end

local function for_a_while(key) redis.call('PEXPIRE', key, MEMORY_MS) end

local function room_is_empty()
  return redis.call('EXISTS', P .. 'waiting') == 0
end

local function enter_room(id, r)
  if room_is_empty() then keep_shares(for_good) end
  redis.call('ZADD', room_of(r.class, r.tenant), r.deadline_ms, id)
  activate(P .. 'waiting:' .. r.class, 'class:' .. r.class, r.tenant)
  activate(P .. 'waiting', 'classes', r.class)
  count('waiting')
end

leave_room = function(id, r)
  if redis.call('ZREM', room_of(r.class, r.tenant), id) == 0 then return end
  count('waiting', -1)
  if redis.call('EXISTS', room_of(r.class, r.tenant)) == 0 then
    redis.call('ZREM', P .. 'waiting:' .. r.class, r.tenant)
    if redis.call('EXISTS', P .. 'waiting:' .. r.class) == 0 then redis.call('ZREM', P .. 'waiting', r.class) end
  end
  if room_is_empty() then keep_shares(for_a_while) end
end

local function next_in(key)
  return redis.call('ZRANGE', key, 0, 0)[1]
end

feed_queue = function()
  if room_is_empty() then return end
  for _ = 1, SHORT_QUEUE - unclaimed() do
    local class = next_in(P .. 'waiting')
    if not class then break end
    local tenant = next_in(P .. 'waiting:' .. class)
    local id = tenant and next_in(room_of(class, tenant))
    if not id then break end
    redis.call('ZREM', room_of(class, tenant), id)
    count('waiting', -1)
    local r = load(id)
    local cost = r and tonumber(r.kv_tokens) or 0
    charge(P .. 'waiting:' .. class, 'class:' .. class, tenant, cost,
           redis.call('EXISTS', room_of(class, tenant)) == 1)
    charge(P .. 'waiting', 'classes', class, cost / math.max(r and tonumber(r.weight) or 1, 0.001),
           redis.call('EXISTS', P .. 'waiting:' .. class) == 1)
    if r and r.state == 'queued' and not r.queue_entry then
      place(id, r)
    end
  end
  if room_is_empty() then keep_shares(for_a_while) end
end

-- a new request, whose record is still to be written, goes into the stream, which has `length` entries, when nobody
-- waits and it is short; else into the room
local function admit(id, r, length, record)
  if room_is_empty() and (length < SHORT_QUEUE or unclaimed(length) < SHORT_QUEUE) then
    place(id, r, record)
  else
    redis.call('HSET', P .. 'request:' .. id, unpack(record))
    enter_room(id, r)
    feed_queue()
  end
end
