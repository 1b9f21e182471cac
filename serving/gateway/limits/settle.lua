-- KEYS: w, l and m of every account. ARGV: lease, ttl ms, tokens, money, 1 if it may have arrived
-- before; then for every account window ms, 1 for a budget. Gives how many accounts it changed.
local lease, ttl = ARGV[1], tonumber(ARGV[2])
local tokens, money, again = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5] == '1'
local changed = 0

for i = 1, #KEYS / 3 do
  local name = string.sub(KEYS[3 * i - 2], 1, -3)
  local window, budget = tonumber(ARGV[4 + 2 * i]), ARGV[5 + 2 * i] == '1'
  local part = math.floor(now / (window / PARTS))
  expire(name)
  windows(name, part)
  local held = redis.call('HGET', name .. ':m', 'L' .. lease)
  if held or not again then
    local more = tokens
    if held then
      local at, reserved, reserved_money = string.match(held, '(%d+) (%d+) (%d+)')
      more = tokens - tonumber(reserved)
      redis.call('ZREM', name .. ':l', lease)
      redis.call('HDEL', name .. ':m', 'L' .. lease)
      redis.call('HINCRBY', name .. ':m', 'held', negative(reserved_money))
      if more < 0 and redis.call('HEXISTS', name .. ':w', 't' .. at) == 1 then
        redis.call('HINCRBY', name .. ':w', 't' .. at, integer(more))
      end
    end
    if more > 0 then
      redis.call('HINCRBY', name .. ':w', 't' .. integer(part), integer(more))
    end
    if budget and money > 0 then
      spent(name)
      redis.call('HINCRBY', name .. ':m', 'd', integer(money))
      redis.call('HINCRBY', name .. ':m', 'm', integer(money))
    end
    keep(name, window, ttl, budget)
    changed = changed + 1
  end
end
return changed
